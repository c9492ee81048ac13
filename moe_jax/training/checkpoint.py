"""Checkpoints: the train state and the place in the data stream, through orbax.

A folder `checkpoints/<step>/` holds the item `state` (arrays), the item `data` (JSON) and a
manifest (see `manifest`). It is written under another name and gets its own in one rename, when
everything is in it: a save that was cut short leaves nothing that looks like a step, and the next
run removes what it left. So a step without its manifest is damaged, never merely unfinished.

What stalls the training step is the copy of the state out of the device and the start of the
checksums, which the device works off between two steps. Writing, hashing and the rename go on in a
background thread. Of several processes each writes its own arrays; the first reads all files again
for the manifest, from the memory that the operating system keeps them in where there is enough of
it. Before a restore each process reads an equal part of the files.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.sharding.processes import failing_together, first_process_says, is_first_process
from moe_jax.training.config import CheckpointConfig
from moe_jax.training.leaf_checksums import as_text, leaf_checksums
from moe_jax.training.manifest import Leaf, Manifest, check_files, read_manifest, write_manifest
from moe_jax.training.orbax_store import Store, named_leaves, reached_preemption, read_items
from moe_jax.training.retention import steps_to_keep
from moe_jax.training.state import TrainState
from moe_jax.training.step_folders import (
  FOLDER,
  checkpoints_of,
  find_step,
  put_in_place,
  remove_leftovers,
  remove_step,
  saved_steps,
  sync_folder,
)

Say = Callable[[str], None]


class DamagedCheckpoint(UserError):
  """A step that is not as it was saved.

  Attributes:
    folder: of the step.
    reason: which part of it is lost or changed.
  """

  def __init__(self, folder: Path, reason: str):
    self.folder, self.reason = folder, reason
    super().__init__(
      f"the checkpoint {folder} is damaged: {reason}; name another step, or delete that folder to"
      " fall back to the checkpoint before it, if there is one"
    )


@dataclasses.dataclass(frozen=True)
class _Save:
  """What the manifest says beyond the files of a step that is being written."""

  step: int
  saved: float
  metric: float | None
  leaves: dict[str, jax.ShapeDtypeStruct]
  checksums: dict[str, jax.Array]


class Checkpoints:
  """Saves in the background and restores what is sound; use as a context manager.

  All processes of a run must call every method, with the same arguments.

  Attributes:
    folder: holds one folder a step.

  Raises:
    UserError: there is a file in the folder's place.
  """

  def __init__(self, workdir: Path, config: CheckpointConfig, say: Say = logging.warning):
    """Opens the checkpoints of a run, and removes what a killed save of it left.

    Args:
      workdir: the run folder.
      config: which steps stay.
      say: is told, in the first process, of every step that is passed over.
    """
    self.folder = (workdir / FOLDER).absolute()
    if self.folder.exists() and not self.folder.is_dir():
      raise UserError(f"{self.folder} is a file, expected the folder of checkpoints; remove it")
    self._config, self._say = config, say
    self._saving: _Save | None = None
    if is_first_process():
      self.folder.mkdir(parents=True, exist_ok=True)
      remove_leftovers(self.folder)
    self._store = Store(self._commit)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def close(self) -> None:
    """Returns when everything saved is on disk; no other method may be called after."""
    self._store.close()

  def latest_step(self) -> int | None:
    """Returns the newest step that has a folder, sound or not; None if there is none."""
    return max(saved_steps(self.folder), default=None)

  def save(
    self, step: int, state: TrainState, data: dict[str, Any], metric: float | None = None
  ) -> None:
    """Saves; the state is copied before this returns, the rest goes on in the background.

    A folder of the same step is replaced. Once the step is complete, newer ones are removed, which
    can only be of a past that the run has gone back behind, and so are those that the policy does
    not keep.

    Args:
      step: optimiser steps done.
      state: of the run after them.
      data: the place in the data stream, JSON-serialisable.
      metric: the held-out loss at this step, if it was evaluated.

    Raises:
      UserError: an earlier save could not be written.
    """
    self._finish()
    leaves = named_leaves(state)
    self._saving = _Save(
      step,
      time.time(),
      None if metric is None or not np.isfinite(metric) else float(metric),
      {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()},
      leaf_checksums(leaves),
    )
    self._store.save(self.folder / str(step), state, data)

  def must_stop(self, step: int) -> bool:
    """Tells whether SIGTERM has reached a process, and all of them are to save this step and end.

    Every one of several processes must ask at every step; a process alone ends by the signal.
    """
    return reached_preemption(step)

  def wait(self) -> None:
    """Returns when everything saved is on disk and complete.

    Raises:
      UserError: it could not be written.
    """
    self._finish()

  def restore(self, step: int, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Restores a step into the shapes, dtypes and shardings of `template` (abstract arrays).

    Whatever devices and processes it was saved from. An array whose sharding the template leaves
    open comes to the first device.

    Raises:
      DamagedCheckpoint: the step is not as it was saved.
      UserError: there is no such step, or it is of another model.
    """
    self._finish()
    with failing_together():
      find_step(self.folder, step)
    return _restore(self.folder / str(step), template)

  def restore_latest(
    self, template: TrainState, at_most: int | None = None
  ) -> tuple[int, TrainState, dict[str, Any]] | None:
    """Restores the newest sound step, passing over damaged ones; all processes take the same.

    Nothing is removed: a step that is passed over stays until a later save replaces it.

    Args:
      template: see `restore`.
      at_most: the newest step that may be taken; None = any.

    Returns:
      (step, state, place in the data); None if there is no step at all.

    Raises:
      UserError: there are steps, and none of them is sound; or a sound one is of another model.
    """
    self._finish()
    return _restore_newest(self.folder, template, at_most, self._say)

  def _finish(self) -> None:
    try:
      self._store.wait()
    except UserError as error:
      raise UserError(
        f"the checkpoint of step {self._saving.step} cannot be written to {self.folder} ({error});"
        " make room or mend the place, and start the same command again"
      ) from error

  def _commit(self, draft: Path) -> None:
    """Completes the folder of a step and gives it its name; called once all arrays are in it."""
    saving = self._saving
    leaves = {
      name: Leaf(leaf.shape, leaf.dtype.name, as_text(saving.checksums[name]))
      for name, leaf in saving.leaves.items()
    }
    write_manifest(draft, step=saving.step, saved=saving.saved, metric=saving.metric, leaves=leaves)
    sync_folder(draft)
    put_in_place(draft, self.folder / str(saving.step))
    self._prune(saving.step)

  def _prune(self, newest: int) -> None:
    """Removes steps behind which the run has gone back, and those that the policy does not keep."""
    metrics = {}
    for step in saved_steps(self.folder):
      if step > newest:
        remove_step(self.folder / str(step))
      else:
        # What cannot be read is no checkpoint to count on, and not ours to remove.
        with contextlib.suppress(UserError):
          metrics[step] = read_manifest(self.folder / str(step)).metric
    for step in metrics.keys() - steps_to_keep(metrics, self._config):
      remove_step(self.folder / str(step))


def restore_model(
  workdir: Path, template: TrainState, step: int | None = None, say: Say = logging.warning
) -> tuple[int, nnx.State]:
  """Returns (step, model variables) of a run's checkpoint, the newest sound one if `step` is None.

  Raises:
    UserError: the run has no checkpoint, or not that one, or none that is sound.
  """
  step, state, _ = _read(workdir, template, step, say)
  return step, state.model


def restore_whole(
  workdir: Path, template: TrainState, step: int | None = None, say: Say = logging.warning
) -> tuple[TrainState, dict[str, Any]]:
  """Returns all that a run's checkpoint holds, state and place in the data, without writing.

  Raises:
    UserError: see `restore_model`.
  """
  return _read(workdir, template, step, say)[1:]


def _read(
  workdir: Path, template: TrainState, step: int | None, say: Say
) -> tuple[int, TrainState, dict[str, Any]]:
  folder = checkpoints_of(workdir).absolute()
  if step is None:
    return _restore_newest(folder, template, None, say)
  return step, *_restore(folder / str(find_step(folder, step)), template)


def _restore_newest(
  folder: Path, template: TrainState, at_most: int | None, say: Say
) -> tuple[int, TrainState, dict[str, Any]] | None:
  """Walks back to a sound step; see `Checkpoints.restore_latest`."""
  reasons = []
  while (step := _newest(folder, at_most)) is not None:
    try:
      return step, *_restore(folder / str(step), template)
    except DamagedCheckpoint as error:
      reasons.append(f"step {step}: {error.reason}")
      if is_first_process():
        say(f"passing over the damaged checkpoint {error.folder}: {error.reason}")
      at_most = step - 1
  if reasons:
    raise UserError(
      f"no checkpoint in {folder} is sound ({'; '.join(reasons)}); delete that folder and"
      " metrics.jsonl to train from the first step again, or bring back a copy of it"
    )
  return None


def _newest(folder: Path, at_most: int | None) -> int | None:
  """Returns the first process's newest step: a file system may show others a folder later."""
  steps = [step for step in saved_steps(folder) if at_most is None or step <= at_most]
  step = first_process_says(max(steps, default=-1))
  return None if step < 0 else step


def _restore(folder: Path, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
  """Restores a step after its files, and checks what has come of it."""
  with _damaging(folder):
    manifest = read_manifest(folder)
    check_files(folder, manifest, jax.process_index(), jax.process_count())
  check_template(folder, manifest, template)
  with _damaging(folder):
    state, data = read_items(folder, template)
  sums = leaf_checksums(named_leaves(state))
  with _damaging(folder):
    check_checksums(manifest, sums)
  return state, data


@contextlib.contextmanager
def _damaging(folder: Path) -> Iterator[None]:
  """Makes the fault of one process a damaged checkpoint on all of them."""
  try:
    with failing_together():
      yield
  except UserError as error:
    raise DamagedCheckpoint(folder, str(error)) from error


def check_template(folder: Path, manifest: Manifest, template: TrainState) -> None:
  """Checks names, shapes and dtypes: orbax itself would turn one dtype into another.

  Raises:
    UserError: names the first array that differs.
  """
  wanted = named_leaves(template)
  for name in sorted(wanted.keys() | manifest.leaves.keys()):
    saved, here = manifest.leaves.get(name), wanted.get(name)
    there = None if saved is None else f"{saved.dtype}{list(saved.shape)}"
    needed = None if here is None else f"{here.dtype.name}{list(here.shape)}"
    if there != needed:
      raise UserError(
        f"the checkpoint {folder} is of another model or optimiser: {name} is {there or 'absent'}"
        f" there, and {needed or 'absent'} by this config; give the config that it was saved with"
      )


def check_checksums(manifest: Manifest, checksums: dict[str, jax.Array]) -> None:
  """Compares restored arrays with those that were saved.

  Raises:
    UserError: names the first that differs, and says only that.
  """
  for name, checksum in checksums.items():
    if as_text(checksum) != manifest.leaves[name].checksum:
      raise UserError(f"the values of {name} are not those that were saved")
