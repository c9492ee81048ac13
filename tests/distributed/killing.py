"""Kills runs of two processes at random moments, and compares what comes of them."""

import contextlib
import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from distributed.tiny_processes import (
  as_in_readme,
  cache,
  finish,
  free_port,
  several_processes,
  start,
)

from moe_jax.training.saved_run import load_run
from moe_jax.training.step_folders import saved_steps

WALL_CLOCK = {"tokens_per_second"}
# Names in the folder of checkpoints that are there only while one is being written.
_WRITING = "*.orbax-checkpoint-tmp*"


def rows(workdir: Path) -> list[dict]:
  """Returns the rows of metrics.jsonl without what the wall clock decides."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in lines]


def start_both(workdir: Path, compiled: Path, further: list[str] = ()) -> list[subprocess.Popen]:
  """Starts the two processes of the README, on a tiny run."""
  port, (*by_hand, _) = free_port(), several_processes()
  commands = [as_in_readme(line, workdir, port) for line in by_hand]
  return [start([*words, *further], env | cache(compiled)) for words, env in commands]


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen]) -> Iterator[None]:
  """Leaves no process behind."""
  try:
    yield
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def run_to_the_end(workdir: Path, compiled: Path, further: list[str] = ()) -> None:
  """Trains without a disturbance."""
  results = finish(start_both(workdir, compiled, further))
  assert [status for status, *_ in results] == [0, 0], results


def kill_once(
  workdir: Path, compiled: Path, draw: random.Random, *, writing: bool, further: list[str] = ()
) -> str:
  """Starts the run, and kills one of its processes, then the other.

  Args:
    workdir: the run folder.
    compiled: where compiled programs are kept.
    draw: which process, and when.
    writing: inside the write of a checkpoint, the second of this start; otherwise after a random
      number of new rows.
    further: words of the command.

  Returns:
    Where it was: "write", "step", or "end" if the run was over before.
  """
  processes = start_both(workdir, compiled, further)
  with ended(processes):
    moment = _wait(processes, workdir, draw, writing=writing)
    first = draw.randrange(2)
    for victim in (first, 1 - first):
      processes[victim].send_signal(signal.SIGKILL)
      # The other one is inside a collective, alone, for a moment.
      time.sleep(draw.uniform(0, 0.2))
  return moment


def assert_equal_runs(a: Path, b: Path) -> None:
  """Checks that two runs wrote the same rows and ended with the same parameters, bit for bit."""
  assert rows(a) == rows(b)
  (_, step_a, model_a), (_, step_b, model_b) = load_run(a), load_run(b)
  assert step_a == step_b
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(model_a), jax.device_get(model_b))


def _wait(
  processes: list[subprocess.Popen], workdir: Path, draw: random.Random, *, writing: bool
) -> str:
  path, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
  began = path.stat().st_mtime_ns if path.exists() else 0
  goal, newest = None, max(saved_steps(checkpoints), default=0)
  while all(process.poll() is None for process in processes):
    moved = path.exists() and path.stat().st_mtime_ns > began
    # One is let through, so that every start gets further than the one before.
    passed = max(saved_steps(checkpoints), default=0) > newest
    if moved and writing and passed and any(checkpoints.glob(_WRITING)):
      time.sleep(draw.uniform(0, 0.03))
      return "write"
    if moved and not writing:
      count = path.read_text().count("\n")
      goal = count + draw.randrange(1, 6) if goal is None else goal
      if count >= goal:
        time.sleep(draw.uniform(0, 0.05))
        return "step"
    time.sleep(0.003)
  return "end"
