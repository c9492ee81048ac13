"""Checksums of arrays: the same on any devices, another for any changed, moved or cast element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.training.leaf_checksums import as_text, device_checksum, host_checksum, leaf_checksums

ARRAYS = {
  "float32": np.linspace(-3, 5, 24, dtype=np.float32).reshape(2, 4, 3),
  "bfloat16": np.linspace(-3, 5, 24).reshape(8, 3).astype(jnp.bfloat16),
  "int32": np.arange(7, dtype=np.int32),
  "int8": np.arange(-5, 6, dtype=np.int8),
  "bool": np.array([[True, False, True]]),
  "scalar": np.float32(2.5).reshape(()),
  "empty": np.zeros((0, 3), np.float32),
}


def mixed(word: int) -> int:
  word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
  word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
  return word ^ word >> 16


def by_hand(array) -> list[int]:
  """The definition, one element after the other in Python's integers."""
  bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(-1).tolist()
  sums = [0, 0]
  for place, word in enumerate(bits):
    key = mixed((place + 0x9E3779B9) % 2**32)
    sums[0] += mixed(word ^ key)
    sums[1] += mixed(word ^ key) * (key | 1)
  return [each % 2**32 for each in sums]


@pytest.mark.parametrize("name", ARRAYS)
def test_host_and_device_agree_with_the_definition(name):
  array = ARRAYS[name]
  assert host_checksum(array).tolist() == by_hand(array)
  assert device_checksum(jnp.asarray(array)).tolist() == by_hand(array)


def test_blocks_of_numpy_are_one_array(monkeypatch):
  whole = host_checksum(ARRAYS["float32"])
  monkeypatch.setattr("moe_jax.training.leaf_checksums._BLOCK", 5)
  np.testing.assert_array_equal(host_checksum(ARRAYS["float32"]), whole)


def test_a_split_array_has_the_checksum_of_the_whole_one():
  mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
  array = jnp.asarray(ARRAYS["float32"])
  split = jax.device_put(array, NamedSharding(mesh, PartitionSpec("a", "b")))
  np.testing.assert_array_equal(device_checksum(split), device_checksum(array))
  found = leaf_checksums({"x": split})["x"]
  assert as_text(found) == as_text(device_checksum(array)) and len(as_text(found)) == 16


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 3, 2)])
def test_any_flipped_bit_of_an_element_changes_both_sums(place):
  array = ARRAYS["float32"]
  before = host_checksum(array)
  for bit in range(32):
    words = array.view(np.uint32).copy()
    words[place] ^= np.uint32(1 << bit)
    assert (host_checksum(words.view(np.float32)) != before).all()


def test_swapped_elements_and_another_dtype_change_it():
  array = ARRAYS["float32"]
  sums = [host_checksum(each) for each in (array, array[::-1], array.astype(jnp.bfloat16))]
  assert len({as_text(each) for each in sums}) == 3
  # A minus zero is another bit pattern than zero.
  zeros = np.zeros(3, np.float32)
  assert as_text(host_checksum(zeros)) != as_text(host_checksum(-zeros))
