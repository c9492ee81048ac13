"""What four processes save, two processes and one restore, and agree on what is damaged."""

import pytest
from distributed.checkpoint_processes import STEPS, restore_newest, start
from distributed.tiny_processes import finish, free_port

from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.config import CheckpointConfig
from moe_jax.training.manifest import read_manifest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run saved by four processes of two devices each."""
  workdir = tmp_path_factory.mktemp("processes") / "run"
  results = finish(start("save", workdir, free_port(), 4, 2))
  assert [status for status, *_ in results] == [0] * 4, results
  return workdir


def test_one_process_restores_what_four_have_saved(saved, capsys):
  said = []
  with Checkpoints(saved, CheckpointConfig(), say=said.append) as checkpoints:
    restore_newest(checkpoints)
  assert capsys.readouterr().out == f"restored {STEPS[-1]}\n" and not said


def test_two_processes_go_back_together_from_what_one_of_them_finds_damaged(saved):
  folder = saved / "checkpoints" / str(STEPS[-1])
  # Each process reads every second file; the first one of these is the second process's.
  name = sorted(read_manifest(folder).files)[1]
  content = bytearray((folder / name).read_bytes())
  content[len(content) // 2] ^= 1
  (folder / name).write_bytes(content)
  results = finish(start("restore", saved, free_port(), 2, 1))
  assert [status for status, *_ in results] == [0, 0], results
  (first, second) = (output.splitlines() for _, output, _ in results)
  (said,) = [line for line in first if line.startswith("passing over")]
  assert str(folder) in said and name in said
  assert first[-1] == second[-1] == f"restored {STEPS[0]}"
  assert not [line for line in second if line.startswith("passing over")]
