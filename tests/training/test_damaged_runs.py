"""A run folder that lost or changed a file is refused in one sentence, and left as it is."""

import asyncio
import dataclasses
import json
import shutil
import sys
import types

import jax
import pytest
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from moe_jax.cli import main
from moe_jax.data.builders import prepare
from moe_jax.errors import UserError
from moe_jax.training import orbax_store
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.config import CheckpointConfig
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.run_folder import claim_run
from moe_jax.training.saved_run import load_run
from moe_jax.training.state import abstract_state
from moe_jax.training.stream import stream_of

STEPS = (2, 4)  # of the checkpoints; every step has a row
RUN = dict(variant="dense")


@pytest.fixture(scope="module")
def half_run(tmp_path_factory):
  """What a run killed after step 4 leaves, as far as anything reads it before training."""
  workdir = tmp_path_factory.mktemp("runs") / "half"
  mapping = tiny.mapping(**RUN)
  config = tiny.experiment(**RUN)
  template = abstract_state(config.model, make_optimizer(config.optimizer, config.steps))
  state = jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), template)
  with claim_run(workdir, mapping), Checkpoints(workdir, CheckpointConfig()) as checkpoints:
    for step in STEPS:
      checkpoints.save(step, state, {})
  rows = [json.dumps({"step": step}) + "\n" for step in range(1, 6)]
  (workdir / "metrics.jsonl").write_text("".join(rows))
  return workdir


@pytest.fixture
def run(half_run, tmp_path):
  return shutil.copytree(half_run, tmp_path / "run")


def contents(workdir) -> dict:
  return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def assert_refused(capsys, workdir, fragments, words=None):
  before = contents(workdir)
  assert main(words or tiny.command(workdir, **RUN)) == 2
  message = capsys.readouterr().err
  assert message.count("\n") == 1, message
  for fragment in fragments:
    assert fragment in message
  assert contents(workdir) == before


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", "{}", '{"model": 3}'])
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_damaged_config_is_named(run, capsys, command, content):
  (run / "config.json").write_text(content)
  words = None if command == "train" else [command, f"--workdir={run}"]
  assert_refused(capsys, run, [str(run), "config.json"], words)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"eval": 3}'])
def test_a_damaged_summary_is_named(run, capsys, content):
  (run / "summary.json").write_text(content)
  assert main(tiny.command(run, **RUN)) == 2
  message = capsys.readouterr().err
  assert f"{run / 'summary.json'} is damaged" in message and message.count("\n") == 1
  assert "delete that file" in message


@pytest.mark.parametrize("part", ["state", "state/manifest.ocdbt", "state/d", "data/metadata"])
@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_a_damaged_checkpoint_is_named_and_the_way_back(run, capsys, caplog, part, damage):
  path = run / "checkpoints" / "4" / part
  if damage == "changed":
    for file in [path] if path.is_file() else path.rglob("*"):
      if file.is_file():
        file.write_bytes(b"garbage")
  elif path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink()
  with pytest.raises(
    UserError, match=f"checkpoint {run}/checkpoints/4 is damaged: {part}.* delete"
  ):
    load_run(run, step=4)
  # The step before it has no place in the data, so that training goes no further.
  assert_refused(capsys, run, [f"{run}/checkpoints/2 is damaged: its place in the data"])
  (line,) = [line for line in caplog.messages if line.startswith("passing over")]
  assert f"the damaged checkpoint {run}/checkpoints/4: {part}" in line


def test_a_run_without_a_sound_checkpoint_is_refused_and_the_faults_named(run, capsys):
  for step in STEPS:
    (run / "checkpoints" / str(step) / "data" / "metadata").unlink()
  fragments = ["is sound (step 4: data/metadata is missing; step 2: data/metadata", "delete that"]
  assert_refused(capsys, run, fragments)


def test_a_checkpoint_without_its_place_in_the_data_is_damaged(run, capsys):
  assert_refused(capsys, run, [f"{run / 'checkpoints' / '4'} is damaged", "KeyError: 'stream'"])


@pytest.mark.parametrize(
  "place",
  [
    {"iterator": {"next_index": -1}},
    {"iterator": {"next_index": float("nan")}},
    {"iterator": 4},
    {"identity": 0},
    {"wall_seconds": float("inf")},
    {"faults": {"passed": float("inf")}},
    {"faults": {"used": -1}},
  ],
)
def test_a_place_in_the_data_that_is_none_is_refused(run, capsys, place):
  """A sound checkpoint, as another version might have written it."""
  config = tiny.experiment(**RUN)
  stream = stream_of(config, prepare(config.data))
  sound = {"identity": dataclasses.asdict(stream), "iterator": {"next_index": 6}}
  given = {"stream": sound | place, "wall_seconds": 1.0} | place
  template = abstract_state(config.model, make_optimizer(config.optimizer, config.steps))
  state = jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), template)
  with Checkpoints(run, CheckpointConfig()) as checkpoints:
    checkpoints.save(6, state, given)
  assert_refused(capsys, run, [f"{run}/checkpoints/6 is damaged: its place in the data"])


def test_a_checkpoint_of_another_model_is_refused_where_it_is_read(run, capsys):
  config = json.loads((run / "config.json").read_text())
  config["model"]["model_dim"] *= 2
  (run / "config.json").write_text(json.dumps(config))
  words = ["generate", f"--workdir={run}", "--prompt=a"]
  assert_refused(capsys, run, ["checkpoints/4 is of another model"], words)


def test_a_file_in_place_of_the_checkpoints_is_named(run, capsys):
  shutil.rmtree(run / "checkpoints")
  (run / "checkpoints").write_text("mine")
  assert_refused(capsys, run, [f"{run / 'checkpoints'} is a file"])


def test_a_folder_in_place_of_the_report_is_named(run, capsys):
  (run / "report.html").mkdir()
  words = ["report", f"--workdir={run}"]
  assert_refused(capsys, run, [f"{run.resolve() / 'report.html'} cannot be"], words)


def test_only_abandoned_work_is_silenced(monkeypatch):
  shown = []
  monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(unraisable.exc_value))
  orbax_store._silence_abandoned_work.__wrapped__()
  thrown_away, other = Exception("error while reading"), RuntimeError("another")
  thrown_away.__cause__ = GeneratorExit()
  for error in (RuntimeError("Event loop is closed"), thrown_away, other, None):
    sys.unraisablehook(types.SimpleNamespace(exc_value=error))
  assert shown == [other, None]


def test_only_what_orbax_awaits_is_silenced(caplog):
  orbax_store._silence_abandoned_work()

  async def fail_alone(reason):
    asyncio.get_running_loop().create_future().set_exception(ValueError(reason))

  for reason in ('Error writing "x" in OCDBT database', "mine"):
    asyncio.run(fail_alone(reason))
  (said,) = caplog.records
  assert "mine" in said.getMessage()
