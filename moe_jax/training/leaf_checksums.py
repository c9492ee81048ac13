"""Checksums of arrays, computed where the arrays are.

A file's hash tells that the file is what was written; it cannot tell that the right numbers were
written, or that what a restore made of the file is right. So each array is summed up at a save, and
again after a restore. The sums are of integers modulo 2**32, which are the same in whatever order:
an array split over any mesh has the checksum of the whole one.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The unsigned type of an element's bits; 64 bits are two words.
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}
# Words that NumPy takes at a time: they stay in the processor's cache.
_BLOCK = 1 << 18


def leaf_checksums(leaves: Mapping[str, jax.Array]) -> dict[str, Any]:
  """Returns the checksum of every array, still being computed if the array is on an accelerator.

  Every process of a run must call this. It reads each array once; devices work it off between two
  steps, at the speed of their memory.

  Args:
    leaves: by name, of any shape and of a dtype of 1, 2, 4 or 8 bytes.

  Returns:
    (2,) uint32 by name; `as_text` writes one.
  """
  # What is in this computer's memory needs no program, which a tiny run would wait for.
  here = {name: leaf for name, leaf in leaves.items() if _is_here(leaf)}
  there = {name: leaf for name, leaf in leaves.items() if name not in here}
  # One program: of many small ones with collectives, two processes may begin different ones first,
  # and wait for each other for ever.
  sums = device_checksums(there) if there else {}
  return {n: host_checksum(np.asarray(here[n])) if n in here else sums[n] for n in leaves}


def as_text(checksum: jax.Array | np.ndarray) -> str:
  """Returns a checksum as 16 hex digits, once it is computed."""
  first, second = np.asarray(checksum).tolist()
  return f"{first:08x}{second:08x}"


def _is_here(leaf: jax.Array) -> bool:
  return leaf.is_fully_addressable and all(each.platform == "cpu" for each in leaf.devices())


def host_checksum(array: np.ndarray) -> np.ndarray:
  """Returns the checksum of an array by NumPy, (2,) uint32."""
  words = np.ascontiguousarray(array).reshape(-1).view(_WORDS[array.dtype.itemsize])
  total = np.zeros(2, np.uint32)
  for start in range(0, words.size, _BLOCK):
    block = words[start : start + _BLOCK].astype(np.uint32)
    total += _sums(block, np.arange(start, start + block.size).astype(np.uint32), np)
  return total


@jax.jit
def device_checksums(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns `device_checksum` of each array, as one program."""
  return {name: device_checksum(array) for name, array in arrays.items()}


def device_checksum(array: jax.Array) -> jax.Array:
  """Returns the checksum of an array by XLA, (2,) uint32, on whatever devices it is split over."""
  words, place = _words(array), jnp.zeros((), jnp.uint32)
  for axis, stride in enumerate(_strides(words.shape)):
    place = place + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
  return _sums(words, place, jnp)


def _sums(words: Any, place: Any, numpy: Any) -> Any:
  """Sums over elements a hash of (bits, place), once as it is and once times a hash of the place.

  For one place the hash is a permutation of the 2**32 words, and the factor odd, so that a single
  changed element always changes both sums; several escape one of them with probability 2**-32.
  """
  # Without the constant the first place would be hashed to nothing.
  place = _mix(place + np.uint32(0x9E3779B9))
  hashes = _mix(words ^ place)
  totals = (hashes, hashes * (place | np.uint32(1)))
  return numpy.stack([total.sum(dtype=np.uint32) for total in totals])


def _mix(words: Any) -> Any:
  """Permutes the 2**32 words so that each bit depends on all (MurmurHash3's finaliser)."""
  words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return words ^ (words >> np.uint32(16))


def _words(array: jax.Array) -> jax.Array:
  """Returns the bits of an array as uint32, with one more axis for elements of two words."""
  if array.dtype == jnp.bool_:
    return array.astype(jnp.uint32)
  bits = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize])
  return bits.astype(jnp.uint32)


def _strides(shape: tuple[int, ...]) -> list[np.uint32]:
  """Returns how far apart in row-major order neighbours on each axis are, modulo 2**32."""
  sizes = (functools.reduce(operator.mul, shape[axis + 1 :], 1) for axis in range(len(shape)))
  return [np.uint32(size % 2**32) for size in sizes]
