"""Meshes over pods without libtpu."""

import numpy as np
from jax.sharding import Mesh

from moe_jax.planning.topology import Topology, parse_topology
from moe_jax.sharding.mesh import MESH_AXES


def fake_mesh(text: str, num_slices: int = 1, **sizes: int) -> tuple[Mesh, Topology]:
  """Returns a mesh of a topology's chips in row-major order, and the topology."""
  topology = parse_topology(text, num_slices)
  shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
  return Mesh(np.array(topology.places()).reshape(shape), MESH_AXES), topology
