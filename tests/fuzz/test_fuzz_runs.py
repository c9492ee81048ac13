"""A damaged run folder is read, or refused in one sentence; what is restored is what was saved."""

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from fuzz.damage import damage_files, damaged_json, file_damages, json_damages
from fuzz.judging import Counter, accepts, command_accepts, contents, run_property
from hypothesis import strategies as st
from training import tiny
from training.saved import assert_same, drawn

from moe_jax.commands import evaluation
from moe_jax.data.builders import prepare
from moe_jax.data.loader_state import save_state
from moe_jax.training import loop
from moe_jax.training.alarms import Alarms
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.config import CheckpointConfig
from moe_jax.training.fault_policy import FaultPolicy
from moe_jax.training.goodput import Goodput
from moe_jax.training.run_folder import claim_run
from moe_jax.training.saved_run import load_state
from moe_jax.training.state import TrainState
from moe_jax.training.stream import stream_of, training_batches

STEPS = (2, 4)
RUN = dict(variant="dense")
COMMANDS = {
  "ls": ["checkpoint", "ls", "{run}"],
  "verify": ["checkpoint", "verify", "{run}"],
  "diff": ["checkpoint", "diff", "{run}", "--step=2", "--other_step=4"],
  "watch": ["watch", "--workdir={run}", "--once"],
  "eval": ["eval", "--workdir={run}"],
  "eval step": ["eval", "--workdir={run}", "--step=2"],
  "report": ["report", "--workdir={run}"],
  "resume": tiny.command("{run}", **RUN),
  "replay": ["train", "--replay={run}", "--workdir={run}.new"],
}


class Started(Exception):
  """All that a command reads of a run has been read."""


def stop(*args, **named):
  """Takes the place of what compiles a program."""
  raise Started


@functools.cache
def place() -> dict:
  """Where a run that has done four steps stands in its data, and in its account of faults."""
  config = tiny.experiment(**RUN)
  data = prepare(config.data)
  batches = training_batches(config, data)
  for _ in range(STEPS[-1]):
    next(batches)
  stream = save_state(batches, stream_of(config, data))
  faults = FaultPolicy(config.faults).state() | {"alarms": Alarms(config.faults, 0).state()}
  return {"stream": stream, "wall_seconds": 1.5, "faults": faults}


def state_of(step: int) -> TrainState:
  return dataclasses.replace(drawn(step), step=jax.numpy.int32(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """What a run killed after step 5 leaves."""
  workdir = tmp_path_factory.mktemp("runs") / "run"
  with claim_run(workdir, tiny.mapping(**RUN)):
    with Checkpoints(workdir, CheckpointConfig()) as checkpoints:
      for step in STEPS:
        checkpoints.save(step, state_of(step), place() | {"step": step}, metric=1 / step)
  rows = [{"step": step, "loss": 3.0 / step, "learning_rate": 0.1} for step in range(1, 6)]
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  events = [{"time": 1.0, "event": "started", "step": 0}]
  (workdir / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
  return workdir


class Runs:
  """Reads damaged run folders by one command each."""

  def __init__(self, root: Path, saved: Path, capsys, monkeypatch):
    self._root, self._saved, self._capsys = root, saved, capsys
    self.counter = Counter()
    monkeypatch.setattr(evaluation, "Evaluator", stop)
    monkeypatch.setattr(loop, "init_state", stop)
    monkeypatch.setattr(loop._Training, "advance", stop)

  def check(self, reader: str, damages: list[tuple]) -> None:
    """Reads a run by one command; one that does not train leaves the folder as it was."""
    case = Path(tempfile.mkdtemp(dir=self._root))
    run = shutil.copytree(self._saved, case / "run")
    damage_files(run, damages)
    before = written(run)
    try:
      accepted = accepts(lambda: restore(run)) if reader == "restore" else self._run(reader, run)
      assert accepted and reader == "report" or written(run) == before
    except Started:
      accepted = True
      assert reader in ("resume", "replay") or written(run) == before
    self.counter.count(accepted)
    shutil.rmtree(case)

  def _run(self, reader: str, run: Path) -> bool:
    return command_accepts(self._capsys, *(word.format(run=run) for word in COMMANDS[reader]))


def written(folder: Path) -> dict:
  """Returns what a folder holds but for its lock, which says nothing."""
  return {name: content for name, content in contents(folder).items() if name != ".lock"}


def restore(run: Path) -> None:
  """Nothing is restored silently wrong: the state is bit for bit that of its step."""
  _, state, data = load_state(run)
  assert data["step"] in STEPS and data == place() | {"step": data["step"]}
  assert_same(state, state_of(data["step"]))


def fuzz_places(tmp_path: Path, monkeypatch, counter: Counter, count: int, seed: int) -> None:
  """A checkpoint that is sound, and says of the data and the faults what no version writes."""
  config = tiny.experiment(**RUN)
  data = prepare(config.data)

  def check(damages):
    restored = (STEPS[-1], state_of(STEPS[-1]), damaged_json(place(), damages))
    monkeypatch.setattr(Checkpoints, "restore_latest", lambda *args: restored)
    counter.count(accepts(resume))

  def resume():
    with contextlib.ExitStack() as stack:
      training = loop._Training(config, data, tmp_path, None, stack, Goodput(tmp_path))
      training.restore()
      next(training._batches)

  run_property(check, count, seed, damages=json_damages)


def fuzz(runs: Runs, readers: list[str], count: int, seed: int) -> None:
  run_property(runs.check, count, seed, reader=st.sampled_from(readers), damages=file_damages)


@pytest.fixture
def runs(tmp_path, saved, capsys, monkeypatch):
  return Runs(tmp_path, saved, capsys, monkeypatch)


def test_damaged_runs_are_read_or_refused(runs):
  fuzz(runs, ["restore", *COMMANDS], count=30, seed=0)
  assert runs.counter.accepted and runs.counter.refused


def test_places_in_the_data_are_restored_or_refused(tmp_path, monkeypatch):
  counter = Counter()
  fuzz_places(tmp_path, monkeypatch, counter, count=15, seed=0)
  assert counter.accepted and counter.refused


@pytest.mark.full
@pytest.mark.parametrize("part", ["restore", "commands", "places"])
def test_many_runs(runs, part, tmp_path, monkeypatch, record_property):
  counter = runs.counter
  if part == "places":
    fuzz_places(tmp_path, monkeypatch, counter, count=100, seed=1)
  else:
    fuzz(runs, ["restore"] if part == "restore" else list(COMMANDS), count=150, seed=1)
  counter.record(record_property)
