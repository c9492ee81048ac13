"""Which checkpoints there are: written whole, kept by the policy, gone back behind."""

import dataclasses
import json
import os
import subprocess

import jax
import jax.numpy as jnp
import pytest
from training import tiny
from training.saved import DATA, assert_same, drawn, save_steps, template

from moe_jax.errors import UserError
from moe_jax.training import checkpoint
from moe_jax.training.checkpoint import Checkpoints, restore_model
from moe_jax.training.config import CheckpointConfig
from moe_jax.training.manifest import read_manifest
from moe_jax.training.retention import steps_to_keep
from moe_jax.training.step_folders import remove_leftovers, saved_steps


def steps_of(workdir) -> list[int]:
  return saved_steps(workdir / "checkpoints")


@pytest.mark.parametrize(
  "policy, kept",
  [
    (dict(keep=2), {5, 6}),
    (dict(keep=1, keep_every=3), {3, 6}),
    (dict(keep=1, keep_best=2), {2, 4, 6}),
    (dict(keep=1, keep_every=5, keep_best=1), {2, 5, 6}),
    (dict(keep=1, at=(3, 4, 9)), {3, 4, 6}),
    (dict(keep=9), {1, 2, 3, 4, 5, 6}),
  ],
)
def test_the_policy_keeps_the_newest_the_periodic_and_the_best(policy, kept):
  # Step 2 is the best, then 4; step 5 was not evaluated.
  losses = {1: 3.0, 2: 1.0, 3: 2.5, 4: 2.0, 5: None, 6: 2.5}
  assert steps_to_keep(losses, CheckpointConfig(**policy)) == kept


def test_saved_are_multiples_single_steps_and_the_last():
  policy = CheckpointConfig(every=4, at=(1, 3, 20))
  assert [step for step in range(1, 12) if policy.is_due(step, 11)] == [1, 3, 4, 8, 11]


@pytest.mark.parametrize("at", [(0,), (10, -1), (2.5,), ("3",)])
def test_a_single_step_that_is_none_is_refused(at):
  with pytest.raises(UserError, match="expected steps, each at least 1"):
    CheckpointConfig(at=at)


def test_of_equal_losses_the_earlier_step_is_the_best():
  assert steps_to_keep({1: 2.0, 2: 2.0, 3: None}, CheckpointConfig(keep=1, keep_best=1)) == {1, 3}


def test_saving_removes_what_the_policy_does_not_keep(tmp_path):
  # The loss of step s is 1 / s, but that of step 3, which is not finite, counts as none.
  with Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_every=2, keep_best=1)) as checkpoints:
    for step, metric in ((1, 0.1), (2, 0.5), (3, float("nan")), (4, None), (5, 0.3)):
      checkpoints.save(step, drawn(step), DATA, metric)
  assert steps_of(tmp_path) == [1, 2, 4, 5]
  assert read_manifest(tmp_path / "checkpoints" / "1").metric == 0.1


def test_the_policy_does_not_count_steps_that_cannot_be_read(tmp_path):
  save_steps(tmp_path, (1, 2), keep=2)
  (tmp_path / "checkpoints" / "2" / "manifest.json").unlink()
  save_steps(tmp_path, (3,), keep=2)
  assert steps_of(tmp_path) == [1, 2, 3]


def test_a_run_that_has_gone_back_replaces_what_it_had_beyond(tmp_path):
  save_steps(tmp_path, (2, 4, 6), keep=3)
  with Checkpoints(tmp_path, CheckpointConfig(keep=3)) as checkpoints:
    assert checkpoints.restore_latest(template(), at_most=5)[0] == 4
    assert checkpoints.restore_latest(template(), at_most=3)[0] == 2
    assert checkpoints.restore_latest(template(), at_most=1) is None
    assert steps_of(tmp_path) == [2, 4, 6]
    checkpoints.save(4, drawn(9), DATA)
    checkpoints.wait()
    assert steps_of(tmp_path) == [2, 4]
    assert_same(checkpoints.restore(4, template())[0], drawn(9))


def test_the_state_is_copied_before_save_returns(tmp_path):
  state = drawn(1)
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    checkpoints.save(1, state, DATA)
    donate = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    donate(state)
    restored = checkpoints.restore(1, template())[0]
  assert_same(restored, drawn(1))


def test_a_save_that_is_cut_short_leaves_no_step(tmp_path, monkeypatch):
  """The kill falls between the last array and the manifest, or between that and the rename."""
  save_steps(tmp_path, (2,))
  for place in ("write_manifest", "sync_folder"):
    with monkeypatch.context() as patch:
      patch.setattr(checkpoint, place, lambda *_, **__: 1 / 0)
      checkpoints = Checkpoints(tmp_path, CheckpointConfig())
      checkpoints.save(4, drawn(4), DATA)
      with pytest.raises(UserError, match="step 4 cannot be written to .*ZeroDivisionError"):
        checkpoints.wait()
    assert steps_of(tmp_path) == [2] and len(os.listdir(tmp_path / "checkpoints")) == 2
  assert restore_model(tmp_path, template())[0] == 2
  save_steps(tmp_path, (4,))
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4"]


def test_a_manifest_can_be_checked_without_this_package(tmp_path):
  save_steps(tmp_path, (2,))
  folder = tmp_path / "checkpoints" / "2"
  subprocess.run(
    ["sha256sum", "--check", "--quiet", "manifest.json.sha256"], cwd=folder, check=True
  )
  manifest = json.loads((folder / "manifest.json").read_text())
  lines = "".join(f"{file['sha256']}  {name}\n" for name, file in manifest["files"].items())
  subprocess.run(
    ["sha256sum", "--check", "--quiet"], cwd=folder, input=lines, text=True, check=True
  )


@pytest.mark.parametrize(
  "changed, fragment",
  [
    (dict(step=jax.ShapeDtypeStruct((2,), "int32")), r"step is int32\[\] there, and int32\[2\] by"),
    (dict(step=jax.ShapeDtypeStruct((), "float32")), r"step is int32\[\] there, and float32\[\]"),
    (dict(step=None), r"step is int32\[\] there, and absent by"),
    (dict(repair=jax.ShapeDtypeStruct((), "int32")), r"repair is absent there, and int32\[\]"),
  ],
)
def test_another_shape_dtype_or_array_is_refused_and_not_walked_back_from(
  tmp_path, changed, fragment
):
  save_steps(tmp_path, (2, 4))
  said = []
  with Checkpoints(tmp_path, CheckpointConfig(), say=said.append) as checkpoints:
    with pytest.raises(UserError, match=f"4 is of another model or optimiser: {fragment}"):
      checkpoints.restore_latest(dataclasses.replace(template(), **changed))
  assert not said


def test_the_best_need_an_evaluation_at_each_checkpoint():
  with pytest.raises(UserError, match="keep_best = 1 needs .* set eval.every = 4"):
    tiny.experiment(checkpoint__keep_best=1, checkpoint__every=4, eval__every=3)


def test_a_kill_while_a_step_is_replaced_leaves_one_of_the_two(tmp_path):
  for name, mark in (("3.replaced", "old"), ("5", "new"), ("5.replaced", "old")):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mark").write_text(mark)
  remove_leftovers(tmp_path)
  assert {path.name: (path / "mark").read_text() for path in tmp_path.iterdir()} == {
    "3": "old",
    "5": "new",
  }
