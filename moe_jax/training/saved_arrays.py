"""Arrays of saved steps without the model that they are of: to verify steps and to compare them.

Arrays are read a few at a time, so that a step may be larger than the memory.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moe_jax.errors import UserError
from moe_jax.training.checkpoint import DamagedCheckpoint, check_checksums
from moe_jax.training.leaf_checksums import host_checksum
from moe_jax.training.manifest import Leaf, Manifest, check_files, read_manifest
from moe_jax.training.orbax_store import read_arrays

# Of arrays that are in memory at a time, unless one alone is larger.
_GROUP_BYTES = 1 << 28


def verify_files(folder: Path) -> Manifest:
  """Returns the manifest of a step, all of whose files are as it says.

  Raises:
    DamagedCheckpoint: names the first file that is not.
  """
  try:
    manifest = read_manifest(folder)
    check_files(folder, manifest)
  except UserError as error:
    raise DamagedCheckpoint(folder, str(error)) from error
  return manifest


def verify_step(folder: Path) -> Manifest:
  """Returns the manifest of a step, all of whose files and arrays are as it says.

  Raises:
    DamagedCheckpoint: names the first file or array that is not.
  """
  manifest = verify_files(folder)
  try:
    for names in _groups(manifest, list(manifest.leaves)):
      arrays = read_arrays(folder, names)
      check_checksums(manifest, {name: host_checksum(array) for name, array in arrays.items()})
  except UserError as error:
    raise DamagedCheckpoint(folder, str(error)) from error
  return manifest


@dataclasses.dataclass(frozen=True)
class Difference:
  """How an array of one step differs from that of the same name in another.

  Attributes:
    name: of the array.
    first: its shape and dtype in the first step; None if it lacks the array.
    second: in the second.
    largest: absolute difference of two elements; NaN where only one of the two is one, None for
      arrays of different shapes.
  """

  name: str
  first: Leaf | None
  second: Leaf | None
  largest: float | None


def compare_steps(first: Path, second: Path) -> tuple[list[Difference], int]:
  """Returns the arrays in which two steps differ, and how many they have between them.

  Raises:
    DamagedCheckpoint: one of them is not as it was saved.
  """
  a, b = verify_files(first), verify_files(second)
  names = sorted(a.leaves.keys() | b.leaves.keys())
  differing = [name for name in names if a.leaves.get(name) != b.leaves.get(name)]
  values = [name for name in differing if _comparable(a.leaves.get(name), b.leaves.get(name))]
  largest = {}
  for group in _groups(a, values):
    pairs = _read(first, group), _read(second, group)
    largest |= {name: _largest_difference(pairs[0][name], pairs[1][name]) for name in group}
  found = [
    Difference(name, a.leaves.get(name), b.leaves.get(name), largest.get(name))
    for name in differing
  ]
  return found, len(names)


def _comparable(a: Leaf | None, b: Leaf | None) -> bool:
  return a is not None and b is not None and a.shape == b.shape


def _read(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
  try:
    return read_arrays(folder, names)
  except UserError as error:
    raise DamagedCheckpoint(folder, str(error)) from error


def _groups(manifest: Manifest, names: Sequence[str]) -> Iterator[list[str]]:
  """Yields the names in groups of arrays that are in memory together."""
  group, size = [], 0
  for name in names:
    # No dtype of an array takes more than 8 bytes an element.
    further = 8 * int(np.prod(manifest.leaves[name].shape, dtype=np.int64))
    if group and size + further > _GROUP_BYTES:
      yield group
      group, size = [], 0
    group.append(name)
    size += further
  if group:
    yield group


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
  """Returns the largest |a - b| in float64, taking NaN for equal to NaN."""
  x, y = a.astype(np.float64), b.astype(np.float64)
  same = (x == y) | (np.isnan(x) & np.isnan(y))
  with np.errstate(invalid="ignore"):
    differences = np.where(same, 0.0, np.abs(x - y))
  return float(differences.max(initial=0.0))
