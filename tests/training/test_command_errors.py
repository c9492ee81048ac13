"""Every fault of a training command is one line on stderr, exit status 2, and nothing written."""

import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from moe_jax.cli import main
from moe_jax.errors import UserError
from moe_jax.training.config import experiment_from
from moe_jax.training.nonfinite import check_finite
from moe_jax.training.run_folder import check_run, claim_run, read_config, write_json

FAULTS = [
  (["--config.moe.num_expert=4"], ["num_expert", "num_experts"]),
  (["config.steps=3"], ["config.steps=3", "--config.steps=3"]),
  (["--config.moe.num_experts=0"], ["num_experts = 0", "at least 1"]),
  (["--config.moe.top_k=9"], ["top_k = 9", "num_experts = 4"]),
  (["--config.moe.top_k=0"], ["top_k = 0", "between 1 and"]),
  (["--config.moe.capacity_factor=-1.0"], ["capacity_factor = -1.0", "greater than 0"]),
  (["--config.moe.weighting=renormalized"], ["renormalized", "top_k = 1", "raw"]),
  (["--config.moe.weighting=rawish"], ["rawish", "raw"]),
  (["--config.moe.dispatch=scatter"], ["scatter", "gather"]),
  (["--config.moe.grouping=fixed"], ["group_size"]),
  (["--config.moe.capacity=0"], ["capacity = 0"]),
  (["--config.steps=0"], ["steps = 0", "at least 1"]),
  (["--config.steps=abc"], ["steps", "abc"]),
  (["--config.steps=2.5"], ["steps", "2.5"]),
  (["--config.accumulation_steps=3"], ["accumulation_steps = 3", "batch_size = 4"]),
  (["--config.batch_size=1000000"], ["batch_size", "1000000"]),
  (["--config.model.segments=(('attention:dens',2),)"], ["attention:dens", "attention:dense"]),
  (["--config.model.num_kv_heads=3"], ["num_kv_heads = 3"]),
  (["--config.model.dtype=float16"], ["float16", "bfloat16"]),
  (["--config.data.tokenizer=byte"], ["byte", "bytes"]),
  (["--config.data.corpus=sotu"], ["sotu", "sotu_1790_1870"]),
  (["--config.data.sequence_length=1"], ["sequence_length"]),
  (["--config.seed=4294967296"], ["seed = 4294967296", "below"]),
  (["--config.moe.overflow=dropless", "--config.moe.capacity=16"], ["capacity = 16", "dropless"]),
  (["--config.sample.temperature=nan"], ["sample.temperature is nan", "finite"]),
  (["--config.sample.temperature=inf"], ["sample.temperature is inf", "finite"]),
  (["--config.sample.temperature=1e300"], ["temperature = 1e+300", "1e+37"]),
  (["--config.sample.max_new_tokens=2000000"], ["max_new_tokens = 2000000", "1048576"]),
  (["--config.sample.prompt=\udcff"], ["udcff", "UTF-8"]),
  (["--config.moe.z_loss_weight=inf"], ["moe.z_loss_weight is inf", "finite"]),
  (["--config.model.init_scale=inf"], ["model.init_scale is inf", "finite"]),
  (["--config.optimizer.clip_norm=inf"], ["optimizer.clip_norm is inf", "finite"]),
  (["--config.steps=2147483648"], ["steps = 2147483648", "below 2147483648"]),
  (["--config.optimizer.b1=1.5"], ["b1 = 1.5", "below 1"]),
  (["--config.optimizer.learning_rate=nan"], ["learning_rate is nan", "finite"]),
  (["--config.optimizer.epsilon=0.0"], ["epsilon = 0.0"]),
  (["--config.model.segments=(('attention:dense',2),)"], ["no moe block"]),
  (["--workdr=x"], ["workdr", "workdir"]),
]


@pytest.mark.parametrize("words, fragments", FAULTS, ids=lambda value: str(value[0]))
def test_fault_is_one_line_and_writes_nothing(tmp_path, capsys, words, fragments):
  workdir = tmp_path / "run"
  assert main(tiny.command(workdir) + words) == 2
  message = capsys.readouterr().err
  assert message.count("\n") == 1, message
  assert message.startswith("moe-jax: error: ")
  for fragment in fragments:
    assert fragment in message
  assert not workdir.exists()


@pytest.mark.parametrize(
  "config, fragments",
  [
    ("missing.py", ["missing.py"]),
    ("configs/quickstrt.py", ["quickstart.py"]),
    ("configs/quickstart.py:dens", ["dens", "moe or dense"]),
  ],
)
def test_wrong_config_file_is_one_line(tmp_path, capsys, monkeypatch, config, fragments):
  monkeypatch.chdir(tiny.ROOT)
  assert main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]) == 2
  message = capsys.readouterr().err
  assert message.count("\n") == 1
  for fragment in fragments:
    assert fragment in message
  assert not (tmp_path / "run").exists()


def test_a_selection_that_only_the_config_file_knows_is_refused(tmp_path, capsys):
  source = (tiny.ROOT / "configs/quickstart.py").read_text()
  own = """
from moe_jax.moe import register_selection
@register_selection("of_a_config_file")
def select(view, config):
  pass
"""
  (tmp_path / "own.py").write_text(source + own)
  words = ["train", f"--config={tmp_path / 'own.py'}", f"--workdir={tmp_path / 'run'}"]
  assert main([*words, "--config.moe.selection=of_a_config_file"]) == 2
  message = capsys.readouterr().err
  assert "of_a_config_file is registered by the config file" in message
  assert "config.imports" in message and message.count("\n") == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("make", ["file", "foreign", "damaged"])
def test_unfit_workdir_is_refused_and_left_alone(tmp_path, capsys, make):
  workdir = tmp_path / "place"
  if make == "file":
    workdir.write_text("mine")
  else:
    workdir.mkdir()
    (workdir / ("config.json" if make == "damaged" else "thesis.tex")).write_text("{mine")
  assert main(tiny.command(workdir)) == 2
  message = capsys.readouterr().err
  assert message.count("\n") == 1 and str(workdir) in message
  kept = workdir if make == "file" else next(workdir.iterdir())
  assert kept.read_text() in ("mine", "{mine")


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
  mapping = tiny.mapping()
  mapping["model"]["vocab_size"] = 100
  with pytest.raises(UserError, match="vocab_size = 100 .* 259 ids"):
    experiment_from(mapping)


@pytest.mark.parametrize(
  "model, message",
  [
    (3, "config.model is 3, expected a section"),
    ("abc", "config.model is 'abc', expected a section"),
    (None, "config.model is None, expected a section"),
    ({"vocab_size": "abc"}, "config.model.vocab_size is 'abc', expected an int"),
    ({"vocab_size": None}, "config.model.vocab_size is None, expected an int"),
  ],
)
def test_a_model_of_the_wrong_type_is_refused(model, message):
  mapping = tiny.mapping()
  mapping["model"] = mapping["model"] | model if isinstance(model, dict) else model
  with pytest.raises(UserError, match=message):
    experiment_from(mapping)


@pytest.mark.parametrize("mapping", [[], 3, None])
def test_an_experiment_that_is_no_section_is_refused(mapping):
  with pytest.raises(UserError, match=r"^config is .*, expected a section"):
    experiment_from(mapping)


@pytest.mark.parametrize("value", [float("inf"), [0.5, float("nan")], np.float32("-inf")])
def test_any_metric_that_is_not_finite_is_named_as_divergence(value):
  row = {"loss": 1.0, "tokens": 7, "tokens_per_second": None, "moe/layer_1/load": [0.5, 0.5]}
  check_finite(3, row)
  with pytest.raises(UserError, match="^learning_rate is (inf|nan|-inf) at step 3: .* diverged"):
    check_finite(3, row | {"learning_rate": value})


def test_the_config_is_compared_again_once_the_folder_is_claimed(tmp_path):
  workdir = tmp_path / "run"
  check_run(workdir, {"steps": 2})
  with claim_run(workdir, {"steps": 1}):
    pass
  with pytest.raises(UserError, match="steps is 1 there and 2 here"):
    with claim_run(workdir, {"steps": 2}):
      pytest.fail("took over another run")
  assert read_config(workdir) == {"steps": 1}


def test_where_data_and_checkpoints_lie_is_no_part_of_a_runs_identity(tmp_path):
  mapping = tiny.mapping()
  with claim_run(tmp_path, mapping):
    pass
  check_run(
    tmp_path,
    tiny.mapping(
      data__data_dir="elsewhere", checkpoint__every=1, checkpoint__keep=9, log__tensorboard=True
    ),
  )
  with pytest.raises(UserError, match="config.log.every"):
    check_run(tmp_path, tiny.mapping(log__every=3))


def test_json_that_cannot_be_written_leaves_nothing_behind(tmp_path):
  path = tmp_path / "config.json"
  write_json(path, {"a": 1})
  before = path.read_bytes()
  with pytest.raises(ValueError):
    write_json(path, {"a": float("inf")})
  assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_diverged_run_stops_with_one_sentence(tmp_path, capsys):
  words = tiny.command(
    tmp_path / "run",
    steps=6,
    optimizer__learning_rate=1e30,
    optimizer__warmup_steps=0,
    optimizer__clip_norm=0.0,
  )
  assert main(words) == 2
  assert "diverged" in capsys.readouterr().err
  assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
  assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
