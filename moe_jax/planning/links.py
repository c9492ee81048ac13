"""How long collectives need on the links between chips, at their published bandwidth.

A slice is a torus. The members of a group lie in a box of it; along each dimension of the box they
are `count` places `stride` apart, and the groups between share those links. All dimensions carry
data at the same time. Latency is left out, and no link does two collectives at once.

* all-gather, reduce-scatter: every device receives (or sends) all parts but its own, over the links
  of all dimensions of the box, both ways where a dimension is a ring. An all-reduce is both.
* all-to-all: a row travels a quarter of a ring on average, a third of a line; half the data of
  either end of a line crosses its middle. The dimension with most traffic decides.
* Among slices each device sends what belongs to the others over its share of the network.
"""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from moe_jax.planning.collectives import Collective, CollectiveKind
from moe_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class LinkTime:
  """Seconds of one run of a collective: over the links of a slice, and over the network."""

  ici: float
  dcn: float


@dataclasses.dataclass(frozen=True)
class _Side:
  """One dimension of a group's box."""

  count: int
  stride: int
  ring: bool


def link_time(collective: Collective, mesh: Mesh, topology: Topology) -> LinkTime:
  """Returns what one run of a collective needs on a topology's links."""
  grouped = mesh.devices.reshape(-1)[collective.groups]
  if collective.kind == CollectiveKind.PERMUTE:
    # All pairs at a time. Neighbours of a mesh axis are neighbours in the torus, at best.
    if any(_num_slices(pair) > 1 for pair in grouped):
      return LinkTime(0.0, collective.num_bytes / topology.chip.dcn_bandwidth)
    return LinkTime(collective.num_bytes / topology.chip.link_bandwidth, 0.0)
  devices = grouped[0]
  slices = _num_slices(devices)
  inside = len(devices) // slices
  sides = _sides(np.array([device.coords for device in devices]), topology)
  ici = _ici_seconds(collective, inside, sides, topology.chip.link_bandwidth)
  times = 2 if collective.kind == CollectiveKind.ALL_REDUCE else 1
  # A device needs its part of what the other slices have: within a slice it is already summed up.
  share = 1 if collective.kind == CollectiveKind.ALL_TO_ALL else 1 / inside
  crossing = collective.num_bytes * share * (slices - 1) / slices
  return LinkTime(ici, times * crossing / topology.chip.dcn_bandwidth)


def _num_slices(devices: np.ndarray) -> int:
  return len({getattr(device, "slice_index", 0) for device in devices})


def _ici_seconds(collective: Collective, members: int, sides: list[_Side], link: float) -> float:
  if members == 1:
    return 0.0
  if collective.kind == CollectiveKind.ALL_TO_ALL:
    return max(
      collective.num_bytes * side.count * side.stride / ((8 if side.ring else 4) * link)
      for side in sides
    )
  bandwidth = sum(link * (2 if side.ring else 1) / side.stride for side in sides)
  seconds = collective.num_bytes * (members - 1) / members / bandwidth
  return 2 * seconds if collective.kind == CollectiveKind.ALL_REDUCE else seconds


def _sides(coords: np.ndarray, topology: Topology) -> list[_Side]:
  """Returns the dimensions along which chips at these (members, dimensions) coordinates differ."""
  sides = []
  for dimension, (size, wraps) in enumerate(zip(topology.shape, topology.wraps, strict=True)):
    places = np.unique(coords[:, dimension])
    if len(places) > 1:
      stride = int(np.min(np.diff(places)))
      # A ring needs all of its dimension, whatever the steps between members.
      ring = wraps and len(places) * stride == size
      sides.append(_Side(len(places), stride, ring))
  return sides
