"""Checkpoints: the train state and the place in the data stream, through orbax.

A folder `checkpoints/<step>/` holds the item `state` (arrays) and the item `data` (JSON). A save
that was cut short leaves a temporary folder, which the next run removes.
"""

import functools
import sys
import textwrap
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.training.config import CheckpointConfig
from moe_jax.training.state import TrainState

_FOLDER = "checkpoints"
_REASON_LENGTH = 200


class Checkpoints:
  """Saves in the background and restores the latest; use as a context manager.

  Attributes:
    folder: holds one folder a step.

  Raises:
    UserError: there is a file in the folder's place.
  """

  def __init__(self, workdir: Path, config: CheckpointConfig):
    self.folder = workdir / _FOLDER
    if self.folder.exists() and not self.folder.is_dir():
      raise UserError(f"{self.folder} is a file, expected the folder of checkpoints; remove it")
    self._manager = ocp.CheckpointManager(
      self.folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=config.keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
      ),
      item_names=("state", "data"),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception) -> None:
    self._manager.close()

  def latest_step(self) -> int | None:
    """Returns the newest complete step, or None."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
    """Saves; the state is copied before this returns, writing goes on in the background."""
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)),
    )

  def wait(self) -> None:
    """Returns when everything saved is on disk."""
    self._manager.wait_until_finished()

  def restore(self, step: int, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Restores a step into the shapes, dtypes and shardings of `template` (abstract arrays).

    Raises:
      UserError: the checkpoint is damaged, or of another model.
    """
    restored = _restore(
      self._manager,
      self.folder,
      step,
      state=ocp.args.StandardRestore(template),
      data=ocp.args.JsonRestore(),
    )
    return restored.state, restored.data


def restore_model(
  workdir: Path, template: TrainState, step: int | None = None
) -> tuple[int, nnx.State]:
  """Returns (step, model variables) of a run's checkpoint, the latest if `step` is None.

  Raises:
    UserError: the run has no checkpoint, or not that one, or it is damaged.
  """
  step, items = _restore_step(workdir, step, state=ocp.args.StandardRestore(template))
  return step, items.state.model


def restore_whole(
  workdir: Path, template: TrainState, step: int | None = None
) -> tuple[TrainState, dict[str, Any]]:
  """Returns all that a run's checkpoint holds, state and place in the data, without writing.

  Raises:
    UserError: see `restore_model`.
  """
  items = {"state": ocp.args.StandardRestore(template), "data": ocp.args.JsonRestore()}
  _, restored = _restore_step(workdir, step, **items)
  return restored.state, restored.data


def _restore_step(workdir: Path, step: int | None, **items: Any) -> tuple[int, Any]:
  folder = workdir / _FOLDER
  if not folder.is_dir():
    raise UserError(f"{workdir} holds no checkpoints; expected a folder made by moe-jax train")
  with ocp.CheckpointManager(folder.absolute(), item_names=("state", "data")) as manager:
    steps = sorted(manager.all_steps())
    if not steps:
      raise UserError(f"{folder} holds no complete checkpoint; run moe-jax train again to go on")
    if step is not None and step not in steps:
      nearest = min(steps, key=lambda s: abs(s - step))
      raise UserError(
        f"{folder} has no step {step}; the nearest is {nearest} (steps: "
        f"{', '.join(map(str, steps))})"
      )
    step = steps[-1] if step is None else step
    return step, _restore(manager, folder, step, **items)


def damaged(folder: Path, error: Exception) -> UserError:
  """Explains that the checkpoint in `folder` cannot be read, and how to do without it."""
  reason = textwrap.shorten(str(error), _REASON_LENGTH, placeholder=" ...")
  return UserError(
    f"the checkpoint {folder} is damaged or of another model ({type(error).__name__}: {reason});"
    " delete that folder to fall back to the checkpoint before it, if there is one"
  )


def _restore(manager: ocp.CheckpointManager, folder: Path, step: int, **items: Any) -> Any:
  _silence_abandoned_reads()
  try:
    return manager.restore(step, args=ocp.args.Composite(**items))
  # Orbax raises whatever its parts do, plain Exception included; only its own code runs here.
  except Exception as error:
    raise damaged(folder / str(step), error) from error


@functools.cache  # Once a process: reads may end long after the restore that they belonged to.
def _silence_abandoned_reads() -> None:
  """Keeps what a failed restore leaves under way from burying its one sentence in tracebacks.

  Reads that end after orbax has closed its event loop report that it is closed, each on its own;
  those that never end report that their coroutine was thrown away.
  """
  show = sys.unraisablehook

  def show_others(unraisable) -> None:
    error = unraisable.exc_value
    thrown_away = error is not None and isinstance(error.__cause__, GeneratorExit)
    if str(error) != "Event loop is closed" and not thrown_away:
      show(unraisable)

  sys.unraisablehook = show_others
