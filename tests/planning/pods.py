"""Pods without libtpu: devices that know their places in a torus, and nothing else."""

import dataclasses
import itertools

import numpy as np
from jax.sharding import Mesh

from moe_jax.planning.topology import Topology, parse_topology
from moe_jax.sharding.mesh import MESH_AXES


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  """One chip."""

  id: int
  coords: tuple[int, ...]
  slice_index: int = 0
  core_on_chip: int = 0
  platform: str = "tpu"
  device_kind: str = "fake"
  process_index: int = 0


def fake_devices(topology: Topology) -> list[FakeDevice]:
  """Returns the chips of a topology in the order of their coordinates."""
  places = list(itertools.product(*(range(size) for size in topology.shape)))
  return [
    FakeDevice(index * len(places) + i, place, index)
    for index in range(topology.num_slices)
    for i, place in enumerate(places)
  ]


def fake_mesh(text: str, num_slices: int = 1, **sizes: int) -> tuple[Mesh, Topology]:
  """Returns a mesh of a topology's chips in row-major order, and the topology."""
  topology = parse_topology(text, num_slices)
  shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
  return Mesh(np.array(fake_devices(topology)).reshape(shape), MESH_AXES), topology
