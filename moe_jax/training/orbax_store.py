"""Where orbax is: writing and reading the two items of a step, and nothing else knows of it.

The item `state` is a tree of arrays, the item `data` JSON.
"""

import asyncio
import functools
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from moe_jax.errors import UserError

# The names of folders that a save leaves if it is cut short.
UNFINISHED = "*.orbax-checkpoint-tmp*"
_AGAIN = ".again"
_REASON_LENGTH = 200

Commit = Callable[[Path], None]


class Store:
  """Writes steps in the background, one after the other; all processes must call every method."""

  def __init__(self, commit: Commit):
    """Prepares to write.

    Args:
      commit: called in the background in the first process when everything is in the folder that
        it is given; it has to rename that to the step's. Waiting includes it.
    """
    self._orbax = ocp.AsyncCheckpointer(_handler(), temporary_path_class=_committing_by(commit))

  def save(self, folder: Path, state: Any, data: Mapping[str, Any]) -> None:
    """Starts to write a step, in place of what is there; returns once the state is copied."""
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
    # Orbax would remove a folder of that name before it has written the new one.
    free = folder.with_name(folder.name + _AGAIN) if folder.exists() else folder
    self._orbax.save(free, args=items, force=True)

  def wait(self) -> None:
    """Returns when the last step is written.

    Raises:
      UserError: it could not be; says only why.
    """
    _silence_abandoned_work()
    try:
      self._orbax.wait_until_finished()
    # Orbax raises whatever its parts do.
    except Exception as error:
      raise UserError(_short(error)) from error

  def close(self) -> None:
    """Waits, and ends the threads."""
    self._orbax.close()


def read_items(folder: Path, template: Any) -> tuple[Any, dict[str, Any]]:
  """Returns (state, data) of a step in the shapes, dtypes and shardings of the template.

  Raises:
    UserError: they cannot be read; says only why.
  """
  _silence_abandoned_work()
  items = {"state": ocp.args.StandardRestore(_placed(template)), "data": ocp.args.JsonRestore()}
  try:
    with ocp.Checkpointer(_handler()) as orbax:
      restored = orbax.restore(folder.absolute(), args=ocp.args.Composite(**items))
  # As above, plain Exception included.
  except Exception as error:
    raise UserError(_short(error)) from error
  return restored.state, restored.data


def read_arrays(folder: Path, names: Collection[str]) -> dict[str, np.ndarray]:
  """Returns some of the arrays of a step's state by name, in this computer's memory.

  Raises:
    UserError: they cannot be read; says only why.
  """
  _silence_abandoned_work()
  handler, path = ocp.PyTreeCheckpointHandler(), epath.Path(folder.absolute() / "state")

  def wanted(name, found):
    skip = name not in names
    return ocp.PLACEHOLDER if skip else jax.ShapeDtypeStruct(found.shape, found.dtype)

  try:
    tree = handler.metadata(path).tree
    named = named_leaves(tree)
    chosen = [wanted(name, found) for name, found in named.items()]
    as_numpy = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(named)
    structure = jax.tree.structure(tree)
    items = ocp.args.PyTreeRestore(
      item=structure.unflatten(chosen), restore_args=structure.unflatten(as_numpy)
    )
    restored = named_leaves(handler.restore(path, args=items))
  # As above.
  except Exception as error:
    raise UserError(_short(error)) from error
  return {name: restored[name] for name in names}


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns the arrays of a tree by the names that orbax gives them."""
  return ocp.tree.to_flat_dict(tree, sep="/")


def reached_preemption(step: int) -> bool:
  """Tells whether a process of several was told to end, and this is the step to end at."""
  return ocp.utils.reached_preemption(step)


def _handler() -> ocp.CompositeCheckpointHandler:
  return ocp.CompositeCheckpointHandler(
    state=ocp.StandardCheckpointHandler(), data=ocp.JsonCheckpointHandler()
  )


def _committing_by(commit: Commit) -> type:
  """Returns orbax's temporary folder, but for its end: `commit(draft)` has to rename it.

  Orbax would rename it before anything could be said of the files in it.
  """

  class Draft(ocp.path.atomicity.AtomicRenameTemporaryPath):
    async def finalize(self) -> None:
      # Orbax writes its own notes on the folder in a thread of their own: a note that came later
      # would miss the folder, or the manifest.
      if self._checkpoint_metadata_store:
        await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
      commit(Path(self.get()))

  return Draft


def _placed(template: Any) -> Any:
  """Names a place for every array: orbax would ask for the devices that it was saved from."""
  alone = SingleDeviceSharding(jax.local_devices()[0])

  def place(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or alone)

  return jax.tree.map(place, template)


def _short(error: Exception) -> str:
  reason = textwrap.shorten(str(error), _REASON_LENGTH, placeholder=" ...")
  return f"{type(error).__name__}: {reason}"


@functools.cache  # Once a process: work may end long after the call that it belonged to.
def _silence_abandoned_work() -> None:
  """Keeps what a failed restore or save leaves under way from burying its one sentence.

  Reads and writes that end after orbax has closed its event loop report that it is closed, each on
  its own; those that never end report that their coroutine was thrown away; and of several that
  fail, orbax raises the first, asyncio reports the others.
  """
  show = sys.unraisablehook

  def show_others(unraisable) -> None:
    error = unraisable.exc_value
    reasons = () if error is None else (error.__cause__, error.__context__)
    thrown_away = any(isinstance(reason, GeneratorExit) for reason in reasons)
    if str(error) != "Event loop is closed" and not thrown_away:
      show(unraisable)

  sys.unraisablehook = show_others
  # Orbax logs with its traceback what waiting raises again.
  logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname)
  )
  # OCDBT is the format that orbax keeps arrays in: what else a program awaits is not silenced.
  logging.getLogger("asyncio").addFilter(
    lambda record: not re.search("exception was never retrieved.*OCDBT", record.getMessage(), re.S)
  )
