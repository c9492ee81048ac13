"""Which devices take part in a collective together, in all the ways in which XLA writes it."""

import math
import re

import numpy as np

_LISTS = re.compile(r"\{([\d,]*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))?\s*\{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_CHOSEN = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_DEVICE_IDS = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")


def parse_groups(text: str, num_devices: int) -> np.ndarray:
  """Returns (groups, members) of logical device numbers.

  Args:
    text: the value of `replica_groups`: lists, an iota with a transpose, or axes of a mesh.
    num_devices: of the program, all of which an empty value means.
  """
  if text.startswith("mesh["):
    return _mesh_groups(text)
  iota = _IOTA.match(text)
  if iota:
    shape, source = _numbers(iota[1]), _numbers(iota[2])
    ids = np.arange(math.prod(source)).reshape(source)
    return (ids.transpose(_numbers(iota[3])) if iota[3] else ids).reshape(shape)
  groups = [_numbers(group) for group in _LISTS.findall(text) if group]
  return np.array(groups) if groups else np.arange(num_devices)[None]


def parse_pairs(text: str) -> np.ndarray:
  """Returns (pairs, 2) of logical device numbers from `source_target_pairs`."""
  return np.array([_numbers(pair) for pair in _LISTS.findall(text)]).reshape(-1, 2)


def _mesh_groups(text: str) -> np.ndarray:
  found = _MESH.match(text)
  axes = {name: int(size) for name, size in _AXIS.findall(found[1])}
  ids = np.arange(math.prod(axes.values()))
  if found[2]:
    order = _DEVICE_IDS.match(found[2])
    ids = ids.reshape(_numbers(order[1]))
    ids = ids.transpose(_numbers(order[2])) if order[2] else ids
  grid, names = ids.reshape(tuple(axes.values())), list(axes)
  chosen = _CHOSEN.findall(found[3])
  for name, before, size in chosen:
    if size:
      grid, names = _split(grid, names, name, int(before), int(size))
  inner = [names.index(f"{name}:{before}" if size else name) for name, before, size in chosen]
  outer = [i for i in range(grid.ndim) if i not in inner]
  members = math.prod(grid.shape[i] for i in inner)
  return grid.transpose(outer + inner).reshape(-1, members)


def _split(grid: np.ndarray, names: list[str], name: str, before: int, size: int):
  """Splits one axis of a grid in three, of which the middle one is a part that a group names."""
  axis = names.index(name)
  rest = grid.shape[axis] // before // size
  shape = (*grid.shape[:axis], before, size, rest, *grid.shape[axis + 1 :])
  parts = [f"{name}:before{before}", f"{name}:{before}", f"{name}:rest{before}"]
  return grid.reshape(shape), [*names[:axis], *parts, *names[axis + 1 :]]


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(",") if number.strip())
