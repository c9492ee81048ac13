"""Two processes that are killed at random and started again end as those that were left alone."""

import json
import random
import signal
import time

import pytest
from distributed.killing import (
  assert_equal_runs,
  ended,
  kill_once,
  rows,
  run_to_the_end,
  start_both,
)

from moe_jax.errors import EXIT_AGAIN
from moe_jax.training.step_folders import saved_steps

KILLS = 5
SHORT = ["--config.checkpoint.every=2", "--config.steps=24"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
  return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled):
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  run_to_the_end(workdir, compiled, SHORT)
  return workdir


def test_killed_five_times_and_resumed_equals_an_undisturbed_run(whole, compiled, tmp_path):
  draw, workdir = random.Random(7), tmp_path / "killed"
  for kill in range(KILLS):
    kill_once(workdir, compiled, draw, writing=kill % 2 == 0, further=SHORT)
  run_to_the_end(workdir, compiled, SHORT)
  assert_equal_runs(workdir, whole)


@pytest.mark.parametrize("told", [1])
def test_sigterm_to_one_of_two_saves_the_same_step_in_both(whole, compiled, tmp_path, told):
  workdir = tmp_path / "told"
  further = [*SHORT, "--config.checkpoint.every=100"]
  processes = start_both(workdir, compiled, further)
  with ended(processes):
    path = workdir / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= 2):
      assert all(process.poll() is None for process in processes)
      time.sleep(0.005)
    processes[told].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=240)[1] for process in processes]
  assert [process.returncode for process in processes] == [EXIT_AGAIN] * 2, said
  (step,) = saved_steps(workdir / "checkpoints")
  assert all(f"step {step} is saved" in each for each in said)
  assert [row["step"] for row in rows(workdir)] == list(range(1, step + 1))
  run_to_the_end(workdir, compiled, SHORT)
  assert_equal_runs(workdir, whole)
  starts = json.loads((workdir / "goodput.json").read_text())["starts"]
  assert [start["first_step"] for start in starts] == [0, step]
