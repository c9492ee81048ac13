"""From a dense run to experts, fewer, more and merged ones, and on with training, by commands."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from surgery_cases import MIXTRAL, leaves_of
from training import tiny

from moe_jax import cli
from moe_jax.analysis.routing_trace import LayerTrace, RoutingTrace
from moe_jax.commands import surgery
from moe_jax.commands.surgery_source import read_source
from moe_jax.config.load import load_config
from moe_jax.convert import save_pretrained
from moe_jax.convert.families import family_in
from moe_jax.convert.hub_config import HubConfig
from moe_jax.data.builders import prepare
from moe_jax.data.config import DataConfig
from moe_jax.errors import UserError
from moe_jax.models import Decoder
from moe_jax.training import new_run
from moe_jax.training.config import experiment_from
from moe_jax.training.loop import run_steps
from moe_jax.training.run_folder import check_run, claim_run
from moe_jax.training.saved_run import load_state
from moe_jax.training.state import TrainState

# The checkpoint of step 2 is the one that is upcycled.
RUN = dict(
  steps=3,
  eval__every=3,
  checkpoint__every=2,
  model__segments=(("attention:dense", 1),),
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
  """Returns the upcycled run, made at step 2 and trained on to step 3."""
  out = dense.parent / "sparse"
  words = ["--num_experts=4", "--layers=all", "--step=2", "--batches=1"]
  assert cli.main(["convert", "upcycle", f"--workdir={dense}", f"--out={out}", *words]) == 0
  go_on(out)
  return out


def test_an_upcycled_run_goes_on_with_the_same_data_and_the_same_loss(dense, sparse):
  note = json.loads((sparse / "surgery.json").read_text())
  assert note["step_0"]["relative_difference"] < 1e-5
  assert note["approximations"] == []
  assert note["source_step"] == note["step"] == 2
  assert note["at_training_capacity"]["dropped_fraction"] == 0
  assert note["parameters"]["after"] > note["parameters"]["before"]
  old, new = rows(dense), rows(sparse)
  assert [new[step]["loss"] for step in (1, 2)] == [old[step]["loss"] for step in (1, 2)]
  # The third step's loss is that of the dense model before its update, on the same batch.
  assert new[3]["loss"] == pytest.approx(old[3]["loss"], rel=1e-5)
  assert new[3]["learning_rate"] == old[3]["learning_rate"]
  assert new[3]["eval_loss"] != old[3]["eval_loss"]


def test_pruning_takes_the_rows_of_the_source_but_for_its_routers(sparse, tmp_path, capsys):
  out = tmp_path / "pruned"
  note = convert("prune", capsys, workdir=sparse, out=out, num_experts=2, set="steps=4")
  config, state, _ = load_state(out)
  assert config.model.moe.routing.num_experts == 2 and int(state.step) == note["step"] == 3
  # One step does not set copies of one network far apart.
  assert 0 < note["step_0"]["relative_difference"] < 0.1
  assert "moe/layer_0/load" in rows(sparse)[3]
  assert not any(name.startswith("moe/") for name in rows(out)[3])
  assert rows(out)[3]["loss"] == rows(sparse)[3]["loss"]
  check_run(out, load_config(str(out / "config.py")).to_dict())


def test_growing_may_start_the_schedule_anew_with_other_fields(sparse, tmp_path, capsys):
  how = {"set": "steps=5", "schedule": "reset", "moments": "reset"}
  note = convert("grow", capsys, workdir=sparse, out=tmp_path / "x", num_experts=5, **how)
  assert (note["source_step"], note["step"]) == (3, 0)
  config, state, place = load_state(tmp_path / "x")
  assert config.steps == 5 and int(state.step) == 0 and place["wall_seconds"] == 0
  assert rows(tmp_path / "x") == {}


def test_merging_counts_use_in_a_trace(sparse, tmp_path, monkeypatch):
  trace = tmp_path / "trace.npz"
  ids = np.array([[[0, 1], [0, 2], [3, 0]]], np.int16)
  layer = LayerTrace(ids, np.full(ids.shape, 0.5, np.float32), np.ones(ids.shape, bool), 4)
  tokens = np.zeros((1, 3), np.int32)
  RoutingTrace("sparse", 3, tokens, tokens == 0, tokens, (layer,)).save(trace)
  made = []
  monkeypatch.setattr(surgery, "finish", lambda args, source, request: made.append(request))
  words = [f"--workdir={sparse}", f"--out={tmp_path / 'x'}", f"--trace={trace}"]
  assert cli.main(["convert", "merge", "--num_experts=1", "--set=moe.top_k=1", *words]) == 2
  assert cli.main(["convert", "merge", "--num_experts=3", *words]) == 0
  (request,) = made
  (edit,) = request.operation(request.model).edits.values()
  # Expert 0 got three tokens, the others one each; one of them joins another.
  shares = sorted(member.share for new in edit.experts for member in new.members)
  assert len(edit.experts) == 3 and shares in ([0.25, 0.75, 1, 1], [0.5, 0.5, 1, 1])


def test_a_checkpoint_of_the_hub_is_the_source_of_a_run_of_defaults(tmp_path):
  settings = HubConfig({**MIXTRAL, "vocab_size": 300})
  config = family_in(settings).read(settings).dropless()
  model = Decoder(config, key=jax.random.key(0))
  save_pretrained(model, config, tmp_path / "hub")
  source = read_source(SimpleNamespace(workdir=None, step=None, checkpoint=tmp_path / "hub"))
  assert source.config.model == config and source.config.data == DataConfig()
  assert int(source.state.step) == 0 and source.place is None
  for path, array in leaves_of(nnx.state(model)).items():
    np.testing.assert_array_equal(source.leaves[path], array)


def test_a_folder_that_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch):
  def fail(*_):
    raise UserError("the disk is full")

  monkeypatch.setattr(new_run.Checkpoints, "save", fail)
  state = TrainState(np.int32(0), {}, {}, (), None)
  with pytest.raises(UserError, match="the disk is full"):
    new_run.write_run(tmp_path / "x", tiny.experiment(), state, {}, title="", notes={})
  assert list(tmp_path.iterdir()) == []


REFUSED = {
  "'upcyle' is no operation of moe-jax convert; did you mean upcycle?": ["upcyle"],
  "--checkpoint=DIR; neither was given": ["upcycle"],
  "has experts already": ["upcycle", "--workdir={sparse}"],
  "has no experts": ["prune", "--workdir={dense}", "--num_experts=1"],
  "takes --num_experts=N, how many of each layer stay, or --drop=IDS": ["prune"],
  "keep at least 2": ["prune", "--workdir={sparse}", "--num_experts=1"],
  "expected 1 to 3": ["merge", "--workdir={sparse}", "--num_experts=4"],
  "the model has 4; expected more": ["grow", "--workdir={sparse}", "--num_experts=4"],
  "expert 7 does not exist": ["prune", "--workdir={sparse}", "--drop=7"],
  "names layer 0 twice": ["prune", "--workdir={sparse}", "--drop=0:1", "--drop=0:2"],
  "noise = nan is refused": [
    *("grow", "--workdir={sparse}", "--num_experts=5", "--noise=nan", "--set=steps=4"),
  ],
  "router_std = 0.0 is refused": [
    *("grow", "--workdir={sparse}", "--num_experts=5", "--init=fresh", "--set=steps=4"),
    "--router_std=0",
  ],
  "num_experts = 5 is refused: the operation makes 6": [
    *("grow", "--workdir={sparse}", "--num_experts=6", "--init=fresh", "--set=steps=4"),
    "--set=moe.num_experts=5",
  ],
  "changes feed-forwards alone": [
    *("prune", "--workdir={sparse}", "--num_experts=3", "--by=norm", "--set=steps=4"),
    "--set=model.segments=(('attention:moe', 2),)",
  ],
  "mtp_depth = 1 is refused": [
    *("prune", "--workdir={sparse}", "--num_experts=3", "--by=norm", "--set=steps=4"),
    "--set=model.mtp_depth=1",
  ],
  "expected ids of experts": ["prune", "--workdir={sparse}", "--drop=a"],
  "names the layers [1]; expected [0]": ["prune", "--workdir={sparse}", "--drop=1:1"],
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
  "steps = 3 is refused: the source stands at step 3": [
    "upcycle",
    "--workdir={dense}",
    "--layers=0",
  ],
  "steps = 1 is refused: the source stands at step 3": [
    *("upcycle", "--workdir={dense}", "--layers=all", "--set=steps=1"),
  ],
  "--set changes data, batch_size, seed": [
    "upcycle",
    "--workdir={dense}",
    "--layers=all",
    "--step=2",
    "--set=seed=1",
  ],
  "contradicts --scaling=router": [
    "upcycle",
    "--workdir={dense}",
    "--layers=all",
    "--set=moe.weight_scale=3.0",
  ],
  "and the target's config asks for": [
    "upcycle",
    "--workdir={dense}",
    "--layers=all",
    "--step=2",
    "--set=model.num_heads=4",
  ],
  "has no step 1": ["upcycle", "--workdir={dense}", "--step=1"],
}


@pytest.mark.parametrize("sentence, words", REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line(
  sentence, words, dense, sparse, tmp_path, capsys
):
  words = [word.format(dense=dense, sparse=sparse) for word in words]
  if not any(word.startswith("--out") for word in words):
    words.append(f"--out={tmp_path / 'x'}")
  assert cli.main(["convert", *words]) == 2
  message = capsys.readouterr().err
  assert sentence in message and message.count("\n") == 1
  assert list(tmp_path.iterdir()) == []
