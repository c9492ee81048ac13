"""The folders of saved steps: `checkpoints/<step>` in a run folder."""

import os
import re
import shutil
from pathlib import Path

from moe_jax.errors import UserError
from moe_jax.training.orbax_store import UNFINISHED

FOLDER = "checkpoints"
_STEP_NAME = re.compile("0|[1-9][0-9]*")
_REMOVED, _REPLACED = ".removed", ".replaced"
# What a kill leaves: of writing, and of removing.
_LEFTOVERS = (UNFINISHED, f"*{_REMOVED}")


def saved_steps(folder: Path) -> list[int]:
  """Returns the steps that have an entry in a folder of checkpoints, in order, sound or not."""
  names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
  return sorted(int(name) for name in names if _STEP_NAME.fullmatch(name))


def find_step(folder: Path, step: int) -> int:
  """Returns the step if a folder of checkpoints has an entry of it.

  Raises:
    UserError: it has none; names the nearest.
  """
  steps = saved_steps(folder)
  if step not in steps:
    nearest = min(steps, key=lambda s: abs(s - step), default="absent: there is none")
    raise UserError(
      f"{folder} has no step {step}; the nearest is {nearest} (steps: {', '.join(map(str, steps))})"
    )
  return step


def checkpoints_of(workdir: Path) -> Path:
  """Returns the folder of a run's checkpoints.

  Raises:
    UserError: there is none, or no step in it.
  """
  folder = workdir / FOLDER
  if not folder.is_dir():
    raise UserError(f"{workdir} holds no checkpoints; expected a folder made by moe-jax train")
  if not saved_steps(folder):
    raise UserError(f"{folder} holds no complete checkpoint; run moe-jax train again to go on")
  return folder


def remove_step(folder: Path) -> None:
  """Removes a step so that no half of it is ever seen under its name."""
  doomed = folder.with_name(folder.name + _REMOVED)
  shutil.rmtree(doomed, ignore_errors=True)
  os.rename(folder, doomed)
  shutil.rmtree(doomed, ignore_errors=True)


def put_in_place(draft: Path, final: Path) -> None:
  """Gives a complete folder its name, in place of one that has it: a kill leaves one of the two."""
  before = final.with_name(final.name + _REPLACED)
  if final.exists():
    os.rename(final, before)
  os.rename(draft, final)
  sync_folder(final.parent)
  shutil.rmtree(before, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
  """Removes what a kill has left in a folder of checkpoints; only the run's own process may."""
  for before in folder.glob(f"*{_REPLACED}"):
    final = before.with_name(before.name.removesuffix(_REPLACED))
    if final.exists():
      shutil.rmtree(before, ignore_errors=True)
    else:
      os.rename(before, final)
  for pattern in _LEFTOVERS:
    for path in folder.glob(pattern):
      shutil.rmtree(path, ignore_errors=True)


def sync_folder(folder: Path) -> None:
  """Returns when the entries of a folder are on disk."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
