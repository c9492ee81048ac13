"""Slices of TPU pods: their names, their shapes, and the devices to compile for without them."""

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from moe_jax.errors import UserError
from moe_jax.planning.chips import Chip, get_chip

# Slices below one cube of 4 x 4 x 4, and those of the flat pods.
_SMALL_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_ALL_2D = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBE = 4
# What makes a v4 chip one device, as the newer ones are by themselves.
_ONE_DEVICE = {"v4": {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}}


@dataclasses.dataclass(frozen=True)
class Place:
  """A chip that nothing can be compiled for: what meshes and links ask of a device, and no more."""

  id: int
  coords: tuple[int, ...]
  slice_index: int
  device_kind: str
  core_on_chip: int = 0
  platform: str = "tpu"
  process_index: int = 0


@dataclasses.dataclass(frozen=True)
class Topology:
  """Slices of one kind of chip.

  Attributes:
    chip: the kind.
    shape: chips of a slice along each dimension of its torus.
    num_slices: slices, joined by the network of the data centre.
  """

  chip: Chip
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def name(self) -> str:
    """The slice as users write it, `v5p:4x4x4`."""
    return f"{self.chip.name}:{_joined(self.shape)}"

  @property
  def num_chips(self) -> int:
    """Chips of all slices."""
    return math.prod(self.shape) * self.num_slices

  @property
  def wraps(self) -> tuple[bool, ...]:
    """Tells of every dimension whether its ends are joined to a ring."""
    # On a torus of cubes nothing below one cube is.
    whole = self.chip.dimensions == 2 or min(self.shape) >= _CUBE
    return tuple(whole and size >= self.chip.wrap for size in self.shape)

  def describe(self) -> str:
    """Returns the name with the number of chips, which the names of products disguise."""
    slices = f"{self.num_slices} slices of " if self.num_slices > 1 else ""
    return f"{slices}{self.name} ({self.num_chips:,} chips)"

  def places(self) -> list[Place]:
    """Returns the chips to lay meshes over where nothing is compiled; needs no libtpu."""
    # Chips of a flat pod have a third coordinate too.
    flat = (1,) * (3 - self.chip.dimensions)
    places = list(itertools.product(*map(range, (*self.shape, *flat))))
    return [
      Place(index * len(places) + i, coords, index, self.chip.device_kind)
      for index in range(self.num_slices)
      for i, coords in enumerate(places)
    ]

  def devices(self) -> Sequence[jax.Device]:
    """Returns devices to compile for; none of them needs to be attached.

    Raises:
      UserError: libtpu is not installed, or does not know the slice.
    """
    # Without it libtpu asks the metadata server of a cloud machine, and waits where there is none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    options = dict(_ONE_DEVICE.get(self.chip.name, {}))
    if self.num_slices > 1:
      options["num_slices"] = self.num_slices
    try:
      return topologies.get_topology_desc(
        platform="tpu", topology_name=self.name, **options
      ).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
      reason = " ".join(str(error).split())[:200]
      raise UserError(
        f"compiling for {self.name} needs the compiler of libtpu, which refused ({reason});"
        " install it with pip install 'moe_jax[tpu]', and mind that only one process at a time may"
        " use it unless ALLOW_MULTIPLE_LIBTPU_LOAD=1 is set"
      ) from error


def parse_topology(text: str, num_slices: int = 1) -> Topology:
  """Returns the topology of a text such as `v5p:4x4x4`.

  Raises:
    UserError: no such chip or slice; names the nearest slice.
  """
  name, _, sizes = text.partition(":")
  chip = get_chip(name)
  if num_slices < 1:
    raise UserError(f"slices = {num_slices} is refused: it must be at least 1")
  try:
    shape = tuple(int(size) for size in sizes.split("x"))
  except ValueError:
    shape = ()
  known = slices_of(chip)
  if shape not in known:
    near = _nearest(shape, known)
    raise UserError(
      f"{text!r} is not a slice of {chip.name}"
      + (f", whose slices have {chip.dimensions} sizes" if len(shape) != chip.dimensions else "")
      + f"; did you mean {chip.name}:{_joined(near)} ({math.prod(near)} chips)?"
    )
  return Topology(chip, shape, num_slices)


def slices_of(chip: Chip) -> list[tuple[int, ...]]:
  """Returns the shapes that slices of a chip have, the smallest first."""
  if chip.dimensions == 2:
    return list(_ALL_2D)
  sizes = range(_CUBE, 24 + 1, _CUBE)
  cubes = [
    shape
    for shape in itertools.combinations_with_replacement(sizes, 3)
    if math.prod(shape) <= chip.max_chips
  ]
  return sorted([*_SMALL_3D, *cubes], key=lambda shape: (math.prod(shape), shape[-1]))


def smallest_slice(chip: Chip, num_chips: float) -> Topology | None:
  """Returns the smallest slice of at least so many chips; None where a slice cannot have them."""
  shapes = (shape for shape in slices_of(chip) if math.prod(shape) >= num_chips)
  shape = next(shapes, None)
  return None if shape is None else Topology(chip, shape)


def _nearest(shape: tuple[int, ...], known: list[tuple[int, ...]]) -> tuple[int, ...]:
  """Returns the shape nearest in number of chips, among equals that with the nearest sides."""
  if not shape or min(shape) < 1:
    return known[min(len(known) - 1, 4)]
  ordered, chips = sorted(shape), math.prod(shape)

  def distance(other):
    sides = itertools.zip_longest(ordered, sorted(other), fillvalue=1)
    return abs(math.log(math.prod(other) / chips)), sum(abs(a - b) for a, b in sides)

  return min(known, key=distance)


def _joined(shape: tuple[int, ...]) -> str:
  return "x".join(map(str, shape))
