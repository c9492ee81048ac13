"""Two processes of two devices each train as one process does; one that dies ends the other."""

import json
import shutil
import time

import jax
import numpy as np
import pytest
from distributed.tiny_processes import (
  DIES_AT,
  KEPT,
  MESH,
  RUN,
  as_in_readme,
  cache,
  finish,
  free_port,
  several_processes,
  slurm,
  start,
)
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from moe_jax.data.builders import prepare
from moe_jax.errors import UserError
from moe_jax.sharding.config import ShardingConfig
from moe_jax.sharding.layout import make_layout
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.loop import run_steps
from moe_jax.training.saved_run import load_run

# Sums over four devices in another order, carried through eight optimiser steps in float32; Adam
# divides by the root of a mean square, so tiny gradients count as much as large ones.
TOLERANCE = 1e-4
WALL_CLOCK = {"tokens_per_second"}


def rows(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def run_here(workdir, **sharding) -> None:
  """Trains, or goes on, on four devices of this process."""
  workdir.mkdir(exist_ok=True)
  config = tiny.experiment(**RUN)
  layout = make_layout(ShardingConfig(**sharding), jax.devices()[:4])
  run_steps(config, prepare(config.data), workdir, layout)
  (workdir / "config.json").write_text(json.dumps(tiny.mapping(**RUN)))


def assert_same_run(a, b):
  assert [row["step"] for row in rows(a)] == [row["step"] for row in rows(b)]
  for x, y in zip(rows(a), rows(b), strict=True):
    assert x.keys() == y.keys()
    for name in x.keys() - WALL_CLOCK:
      np.testing.assert_allclose(x[name], y[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
  for x, y in zip(
    *(jax.tree.leaves(jax.device_get(load_run(each)[2])) for each in (a, b)), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(folder):
  """A run of one process on the same mesh."""
  run_here(folder / "alone", **MESH)
  return folder / "alone"


@pytest.fixture(scope="module")
def broken(folder):
  """A run of two processes of which the second dies; returns its folder, results and seconds."""
  workdir, port = folder / "broken", free_port()
  *by_hand, _ = several_processes()
  started = time.monotonic()
  processes = []
  for line, fate in zip(by_hand, ("lives", "dies"), strict=True):
    words, variables = as_in_readme(line, workdir, port)
    processes.append(start(words, variables | cache(folder / "compiled"), fate))
  return workdir, finish(processes), time.monotonic() - started


@pytest.fixture(scope="module")
def resumed(folder, broken):
  """The broken run gone on with, by processes that find each other through Slurm."""
  workdir, port = folder / "resumed", free_port()
  shutil.copytree(broken[0], workdir)
  words, _ = as_in_readme(several_processes()[-1], workdir, port)
  compiled = cache(folder / "compiled")
  return workdir, finish([start(words, slurm(i, port) | compiled) for i in (0, 1)])


def test_a_process_that_dies_ends_the_other_with_a_fault(broken):
  workdir, ((first, *_), (second, *_)), seconds = broken
  assert second == -9 and first != 0
  assert seconds < 90
  assert [row["step"] for row in rows(workdir)][-1] in (DIES_AT - 1, DIES_AT)
  assert (workdir / "checkpoints" / str(KEPT)).is_dir()
  assert not (workdir / "summary.json").exists()


def test_a_run_that_was_killed_and_resumed_ends_as_one_process_does(alone, resumed):
  workdir, results = resumed
  assert [status for status, *_ in results] == [0, 0], results
  assert_same_run(workdir, alone)


def test_only_the_first_process_shows_results_and_writes(resumed):
  workdir, ((_, shown, _), (_, quiet, _)) = resumed
  assert "held-out bits per byte" in shown and f"resuming {workdir} at step {KEPT}" in shown
  # Threads of Gloo write into each other's lines.
  assert not any(word in quiet for word in ("held-out", "resuming", "loss", "step"))
  assert (workdir / "report.html").is_file()
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["environment"]["devices"] == 4
  assert len(summary["routing"]) == 1 and summary["sample"]["text"]


def test_a_checkpoint_of_two_processes_goes_on_in_one_on_another_mesh(folder, broken, alone):
  workdir = folder / "other"
  shutil.copytree(broken[0], workdir)
  run_here(workdir, layout="ep", data=2, expert=2)
  assert_same_run(workdir, alone)


def test_processes_that_are_told_to_end_save_the_step_they_are_at(folder, monkeypatch):
  monkeypatch.setattr(Checkpoints, "must_stop", lambda _, step: step == 3)
  small = dict(eval__every=100, model__segments=(("attention:dense", 1),), model__scan_unroll=1)
  config, workdir = tiny.experiment("dense", **small), folder / "told"
  workdir.mkdir()
  with pytest.raises(UserError, match="step 3 is saved"):
    run_steps(config, prepare(config.data), workdir)
  with Checkpoints(workdir, config.checkpoint) as checkpoints:
    assert checkpoints.latest_step() == 3
  assert [row["step"] for row in rows(workdir)] == [1, 2, 3]
