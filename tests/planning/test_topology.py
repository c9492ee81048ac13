"""Names of slices: what is one, what is not, and what was probably meant."""

import math

import pytest

from moe_jax.errors import UserError
from moe_jax.planning.chips import CHIPS
from moe_jax.planning.topology import parse_topology, slices_of, smallest_slice


def test_a_topology_knows_its_chips():
  topology = parse_topology("v5p:4x8x8", num_slices=2)
  assert (topology.num_chips, topology.shape) == (512, (4, 8, 8))
  assert topology.describe() == "2 slices of v5p:4x8x8 (512 chips)"
  assert parse_topology("v5p:4x4x4").describe() == "v5p:4x4x4 (64 chips)"


@pytest.mark.parametrize(
  ("text", "meant"),
  [
    ("v5p:4x4x5", "v5p:4x4x4"),
    ("v5p:8x4x4", "v5p:4x4x8"),
    ("v5p:4x4", "v5p:2x2x4"),
    ("v5p:64x64x64", "v5p:16x16x24"),
    ("v6e:32x32", "v6e:16x16"),
    ("v5e:4x4x4", "v5e:8x8"),
    ("v5p:", "v5p:4x4x4"),
    ("v5p:axb", "v5p:4x4x4"),
  ],
)
def test_what_is_no_slice_names_the_nearest(text, meant):
  with pytest.raises(UserError, match=rf"is not a slice of .* did you mean {meant} \(") as refused:
    parse_topology(text)
  assert repr(text) in str(refused.value)


def test_an_unknown_chip_names_the_nearest():
  with pytest.raises(UserError, match="'v5x' is not a chip .*did you mean v5"):
    parse_topology("v5x:4x4x4")
  with pytest.raises(UserError, match="slices = 0 is refused"):
    parse_topology("v5p:4x4x4", 0)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_slices_of_a_chip_are_within_its_pod_and_all_parse(chip):
  shapes = slices_of(chip)
  assert max(map(math.prod, shapes)) == chip.max_chips
  for shape in shapes:
    assert parse_topology(f"{chip.name}:{'x'.join(map(str, shape))}").shape == shape


def test_rings_are_whole_cubes_or_sixteen_chips():
  assert parse_topology("v5p:4x4x8").wraps == (True, True, True)
  assert parse_topology("v5p:2x4x4").wraps == (False, False, False)
  assert parse_topology("v5e:8x16").wraps == (False, True)


def test_the_smallest_slice_for_a_number_of_chips():
  v5p = CHIPS["v5p"]
  assert smallest_slice(v5p, 65).name == "v5p:4x4x8"
  assert smallest_slice(v5p, 64).name == "v5p:4x4x4"
  assert smallest_slice(v5p, 7000) is None


def test_places_are_the_chips_of_all_slices():
  places = parse_topology("v5p:2x2x4", num_slices=2).places()
  assert [place.id for place in places] == list(range(32))
  assert places[5].coords == (0, 1, 1) and places[16].coords == (0, 0, 0)
  assert [place.slice_index for place in places] == [0] * 16 + [1] * 16
  # JAX asks for three coordinates of every TPU.
  assert parse_topology("v6e:2x4").places()[-1].coords == (1, 3, 0)
