"""From a dense run to experts, fewer, more and merged ones, and on with training, by commands."""

import json

import pytest
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from moe_jax import cli
from moe_jax.config.load import load_config
from moe_jax.convert import save_pretrained
from moe_jax.data.builders import prepare
from moe_jax.errors import UserError
from moe_jax.models import Decoder
from moe_jax.training import new_run
from moe_jax.training.config import experiment_from
from moe_jax.training.loop import run_steps
from moe_jax.training.run_folder import check_run, claim_run
from moe_jax.training.saved_run import load_state

# Two blocks; the checkpoint of step 2 is the one that is operated on.
RUN = dict(
  steps=3,
  eval__every=3,
  checkpoint__every=2,
  model__segments=(("attention:dense", 2),),
  eval__batch_size=1024,
)


def train(workdir, mapping):
  """Trains as `moe-jax train` does, without the summary and the report."""
  check_run(workdir, mapping)
  config = experiment_from(mapping)
  with claim_run(workdir, mapping):
    run_steps(config, prepare(config.data), workdir)
  return rows(workdir)


def go_on(workdir):
  """Trains a run that a command made, by the config file that it holds."""
  return train(workdir, load_config(str(workdir / "config.py")).to_dict())


def rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return {row["step"]: row for row in map(json.loads, lines)}


def convert(operation, capsys, **flags):
  """Runs one operation with --json and returns what it prints."""
  words = [f"--{name}={value}" for name, value in flags.items()]
  assert cli.main(["convert", operation, "--json", "--batches=1", *words]) == 0
  return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "dense"
  train(workdir, tiny.mapping("dense", **RUN))
  return workdir


@pytest.fixture(scope="module")
def sparse(dense):
  """Returns the upcycled run at step 2."""
  out = dense.parent / "sparse"
  words = ["--num_experts=4", "--layers=1", "--step=2"]
  assert cli.main(["convert", "upcycle", f"--workdir={dense}", f"--out={out}", *words]) == 0
  return out


def test_an_upcycled_run_goes_on_with_the_same_data_and_the_same_loss(dense, sparse):
  note = json.loads((sparse / "surgery.json").read_text())
  assert note["step_0"]["relative_difference"] < 1e-5
  assert note["approximations"] == []
  assert note["source_step"] == note["step"] == 2
  assert note["at_training_capacity"]["dropped_fraction"] == 0
  assert note["parameters"]["after"] > note["parameters"]["before"]
  old, new = rows(dense), go_on(sparse)
  assert [new[step]["loss"] for step in (1, 2)] == [old[step]["loss"] for step in (1, 2)]
  # The third step's loss is that of the dense model before its update, on the same batch.
  assert new[3]["loss"] == pytest.approx(old[3]["loss"], rel=1e-5)
  assert new[3]["learning_rate"] == old[3]["learning_rate"]
  assert new[3]["eval_loss"] != old[3]["eval_loss"]


def test_experts_are_pruned_merged_and_grown_and_the_run_goes_on(sparse, tmp_path, capsys):
  source = dict(workdir=sparse, step=2)
  pruned = convert("prune", capsys, out=tmp_path / "pruned", num_experts=2, **source)
  merged = convert("merge", capsys, out=tmp_path / "merged", num_experts=2, **source)
  grown = convert("grow", capsys, out=tmp_path / "grown", num_experts=6, noise=0, **source)
  # All experts are copies of one network still, and K = 2 of them are left.
  for note in (pruned, merged, grown):
    assert note["step_0"]["relative_difference"] < 1e-5
  totals = [note["parameters"]["after"] for note in (pruned, merged, grown)]
  assert totals[0] == totals[1] < totals[2]
  assert load_state(tmp_path / "grown")[0].model.moe.routing.num_experts == 6
  after = go_on(tmp_path / "pruned")
  assert len(after[3]["moe/layer_1/load"]) == 2
  assert not any(name.startswith("moe/") for name in after[2])


def test_a_run_may_start_its_schedule_anew_with_other_fields(dense, tmp_path, capsys):
  words = {"set": "steps=5", "schedule": "reset", "moments": "reset"}
  note = convert("upcycle", capsys, workdir=dense, out=tmp_path / "new", parts=2, **words)
  assert (note["source_step"], note["step"]) == (3, 0)
  # Two parts of a router that picks at random: a router = virtual_groups would be exact.
  assert "does not pick every part" in note["approximations"][0]
  config, state, place = load_state(tmp_path / "new")
  assert config.steps == 5 and int(state.step) == 0
  assert place["wall_seconds"] == 0


def test_a_checkpoint_of_the_hub_is_a_source_too(tmp_path, capsys):
  import jax

  config = tiny.experiment().model
  config = config.with_routing(weighting="softmax_selected", top_k=2).dropless()
  config = _mixtral(config)
  save_pretrained(Decoder(config, key=jax.random.key(0)), config, tmp_path / "hub")
  out = tmp_path / "pruned"
  note = convert("prune", capsys, checkpoint=tmp_path / "hub", out=out, num_experts=3, by="norm")
  assert note["step"] == 0 and note["parameters"]["after"] < note["parameters"]["before"]
  assert load_state(out)[0].model.moe.routing.num_experts == 3


def _mixtral(config):
  """Returns a config of that family with the widths of another one."""
  from moe_jax.convert.families import family_in
  from moe_jax.convert.hub_config import HubConfig

  settings = {
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": config.vocab_size,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
  }
  hub = HubConfig(settings)
  return family_in(hub).read(hub).dropless()


def test_a_target_that_cannot_be_finished_leaves_nothing(dense, tmp_path, monkeypatch, capsys):
  def fail(*_):
    raise UserError("the disk is full")

  monkeypatch.setattr(new_run.Checkpoints, "save", fail)
  words = [f"--workdir={dense}", f"--out={tmp_path / 'x'}", "--batches=1"]
  assert cli.main(["convert", "upcycle", *words]) == 2
  assert "the disk is full" in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []


REFUSED = {
  "'upcyle' is no operation of moe-jax convert; did you mean upcycle?": ["upcyle"],
  "source; neither was given": ["upcycle"],
  "has experts already": ["upcycle", "--workdir={sparse}"],
  "has no experts": ["prune", "--workdir={dense}", "--num_experts=1"],
  "takes --num_experts=N, how many of each layer stay, or --drop=IDS": ["prune"],
  "keep at least 2": ["prune", "--workdir={sparse}", "--num_experts=1"],
  "expected 1 to 3": ["merge", "--workdir={sparse}", "--num_experts=4"],
  "the model has 4; expected more": ["grow", "--workdir={sparse}", "--num_experts=4"],
  "expert 7 does not exist": ["prune", "--workdir={sparse}", "--drop=7"],
  "expected ids of experts": ["prune", "--workdir={sparse}", "--drop=a"],
  "names the layers [0]; expected [1]": ["prune", "--workdir={sparse}", "--drop=0:1"],
  "--by=size is not one of usage, norm": [
    *("prune", "--workdir={sparse}", "--num_experts=2", "--by=size"),
  ],
  "align = 'no' is not one of none, permutation": [
    *("merge", "--workdir={sparse}", "--num_experts=2", "--align=no"),
  ],
  "moments = 'keep' is not one of carry, reset": ["upcycle", "--moments=keep"],
  "--batches=0 is refused": ["upcycle", "--batches=0"],
  "exists and is not an empty folder": ["upcycle", "--out={dense}"],
  "preset 'mixtrall' does not exist": ["upcycle", "--preset=mixtrall"],
  "steps = 1 is refused: the source stands at step 3": [
    *("upcycle", "--workdir={dense}", "--set=steps=1"),
  ],
  "--set changes data, batch_size, seed": ["upcycle", "--workdir={dense}", "--set=seed=1"],
  "contradicts --scaling=router": ["upcycle", "--workdir={dense}", "--set=moe.weight_scale=3.0"],
  "and the target's config asks for": ["upcycle", "--workdir={dense}", "--set=model.num_heads=4"],
  "has no step 1": ["upcycle", "--workdir={dense}", "--step=1"],
}


@pytest.mark.parametrize("sentence, words", REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(
  sentence, words, dense, sparse, tmp_path, capsys
):
  words = [word.format(dense=dense, sparse=sparse) for word in words]
  if not any(word.startswith("--out") for word in words):
    words.append(f"--out={tmp_path / 'x'}")
  if words[0] == "prune" and "--workdir" in words[1] and sparse.name in words[1]:
    words.append("--step=2")
  assert cli.main(["convert", *words]) == 2
  message = capsys.readouterr().err
  assert sentence in message and message.count("\n") == 1
  assert list(tmp_path.iterdir()) == []
