"""`moe-jax checkpoint` tells what is saved, whether it is sound, and in what two steps differ."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.saved import DATA, drawn, save_steps

from moe_jax.cli import main
from moe_jax.training import saved_arrays
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.config import CheckpointConfig
from moe_jax.training.manifest import read_manifest, write_manifest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("saved") / "run"
  save_steps(workdir, (2, 4))
  return workdir


@pytest.fixture
def run(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "run")


def save(workdir, step, state) -> None:
  with Checkpoints(workdir, CheckpointConfig(keep=9)) as checkpoints:
    checkpoints.save(step, state, DATA)


def lose_data(run, step) -> None:
  (run / "checkpoints" / str(step) / "data" / "metadata").unlink()


def test_ls_shows_each_step_and_why_it_is_not_sound(run, capsys):
  lose_data(run, 4)
  assert main(["checkpoint", "ls", str(run)]) == 0
  shown = [line.split() for line in capsys.readouterr().out.splitlines()]
  (sound,) = [words for words in shown if words[:1] == ["2"]]
  (damaged,) = [words for words in shown if words[:1] == ["4"]]
  assert sound[-2:] == ["0.5000", "sound"] and sound[2] == "K"
  assert " ".join(damaged[1:]) == "data/metadata is missing"


def test_verify_reads_all_steps_or_one(run, capsys):
  assert main(["checkpoint", "verify", str(run)]) == 0
  manifests = {step: read_manifest(run / "checkpoints" / str(step)) for step in (2, 4)}
  assert capsys.readouterr().out == "".join(
    f"step {step}: sound ({len(each.files)} files, {len(each.leaves)} arrays)\n"
    for step, each in manifests.items()
  )
  lose_data(run, 2)
  assert main(["checkpoint", "verify", f"--workdir={run}", "--step=4"]) == 0
  assert main(["checkpoint", "verify", str(run)]) == 2
  shown = capsys.readouterr()
  assert "step 2: damaged: data/metadata is missing" in shown.out
  assert "1 of 2 checkpoints" in shown.err and "(steps 2)" in shown.err


def test_verify_reads_the_values_too(run, capsys):
  """A manifest that fits the files, and arrays that are not those it speaks of."""
  folder = run / "checkpoints" / "4"
  manifest = read_manifest(folder)
  leaves = dict(manifest.leaves)
  leaves["step"] = dataclasses.replace(leaves["step"], checksum="0" * 16)
  for name in ("manifest.json", "manifest.json.sha256"):
    (folder / name).unlink()
  write_manifest(folder, step=4, saved=0.0, metric=None, leaves=leaves)
  assert main(["checkpoint", "verify", str(run), "--step=4"]) == 2
  assert "step 4: damaged: the values of step are not those" in capsys.readouterr().out


@pytest.mark.parametrize("group_bytes", [1, 1 << 28])
def test_diff_names_the_arrays_and_the_largest_difference(
  tmp_path, capsys, monkeypatch, group_bytes
):
  monkeypatch.setattr(saved_arrays, "_GROUP_BYTES", group_bytes)
  state = drawn(1)
  params = jax.tree.map(lambda a: a, state.params)
  head = np.array(params["head"].get_value())
  head[3, 5] += 0.75
  params["head"].set_value(jnp.asarray(head))
  changed = dataclasses.replace(
    state, params=params, step=state.step.astype("float32"), repair=jnp.zeros(3)
  )
  save(tmp_path / "a", 1, state)
  save(tmp_path / "b", 1, changed)
  assert main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
  shown = " ".join(capsys.readouterr().out.split())
  assert "arrays are equal" in shown
  assert "params/head/value float32[16, 259] float32[16, 259] 0.75" in shown
  assert "repair absent float32[3]" in shown
  assert "step int32[] float32[] 0, other bits" in shown


def test_diff_of_two_steps_of_a_run(run, capsys):
  words = ["checkpoint", "diff", str(run), "--step=2", "--other_step=2"]
  assert main(words) == 0
  assert capsys.readouterr().out.count("arrays are equal") == 1
  assert main([*words[:3], "--step=2", "--other_step=4"]) == 0
  assert ": 0 of " in capsys.readouterr().out
  lose_data(run, 4)
  assert main([*words[:3], "--step=2", "--other_step=4"]) == 2
  assert "checkpoints/4 is damaged: data/metadata is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
  "words, fragment",
  [
    (["checkpoint"], "moe-jax checkpoint needs an operation, one of ls, verify, diff"),
    (["checkpoint", "list"], "'list' is no operation of moe-jax checkpoint"),
    (["checkpoint", "ls"], "moe-jax checkpoint ls needs --workdir=DIR"),
    (["checkpoint", "ls", "a", "b"], "unexpected argument 'b'"),
    (["checkpoint", "ls", "nowhere"], "nowhere holds no checkpoints"),
    (["checkpoint", "verify", "{run}", "--step=3"], "has no step 3; the nearest is 2"),
    (["checkpoint", "diff", "{run}"], "needs a second run, or --other_step"),
    (["checkpoin", "ls"], "did you mean checkpoint?"),
  ],
)
def test_a_wrong_command_line_is_one_sentence(saved, capsys, words, fragment):
  assert main([word.format(run=saved) for word in words]) == 2
  message = capsys.readouterr().err
  assert fragment in message and message.count("\n") == 1


def test_the_operations_are_listed(capsys):
  assert main(["checkpoint", "--help"]) == 0
  assert "checkpoint verify" in capsys.readouterr().out
  assert main(["checkpoint", "ls", "--help"]) == 0
  assert "usage: moe-jax checkpoint ls DIR" in capsys.readouterr().out
