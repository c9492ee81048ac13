"""Which device holds which expert, so that devices carry equal loads: NumPy on the host.

`place_replicas` is DeepSeek's expert-parallelism load balancer (github.com/deepseek-ai/EPLB, arXiv
2412.19437 section 3.4), which copies hot experts into spare slots; `place_by_moving` gives every
expert one slot, so that a permutation of the experts does it all and nothing looks up a table.
Loads are counts or shares of assignments, layers on their own; physical slots are numbered device
by device, devices node by node.
"""

import dataclasses
import enum

import numpy as np

from moe_jax.choices import as_choice
from moe_jax.errors import UserError
from moe_jax.moe.expert_packing import pack_evenly, replicate_experts


class PlacementPolicy(enum.StrEnum):
  """How replicas are spread."""

  GLOBAL = "global"  # over all devices alike
  # Expert groups stay whole on a node, so that group-limited routing stays within few nodes.
  HIERARCHICAL = "hierarchical"


@dataclasses.dataclass(frozen=True)
class Devices:
  """Where experts can be: `count` devices in all, in `nodes` nodes of equally many."""

  count: int
  nodes: int = 1

  def __post_init__(self):
    for name in ("count", "nodes"):
      if getattr(self, name) < 1:
        raise UserError(f"{name} = {getattr(self, name)} is refused: it must be at least 1")
    if self.count % self.nodes:
      raise UserError(
        f"nodes = {self.nodes} is refused: it must divide the {self.count} devices; the nearest"
        f" that does is {nearest_divisor(self.count, self.nodes)}"
      )


@dataclasses.dataclass(frozen=True)
class ExpertPlacement:
  """Tables of X layers: E logical experts in P physical slots.

  Attributes:
    physical_to_logical: (X, P) int32, the expert in each slot.
    logical_to_physical: (X, E, R) int32, the slots of each expert's replicas, -1 beyond them; R is
      the most replicas of any expert.
    replicas: (X, E) int32, at least 1.
  """

  physical_to_logical: np.ndarray
  logical_to_physical: np.ndarray
  replicas: np.ndarray


def place_replicas(
  load: np.ndarray,
  devices: Devices,
  *,
  spare: int = 0,
  groups: int = 1,
  policy: PlacementPolicy = PlacementPolicy.GLOBAL,
) -> ExpertPlacement:
  """Places E experts and `spare` replicas of the hottest, P / devices slots on every device.

  `hierarchical` packs expert groups to nodes, gives replicas within a node, and packs them to its
  devices; `global` is the same with a single group and node.

  Args:
    load: (X, E) non-negative.
    devices: where.
    spare: slots beyond E, over all devices; P = E + spare.
    groups: expert groups, of consecutive ids; `global` does not look at them.
    policy: see `PlacementPolicy`.

  Raises:
    UserError: loads that are no loads, or numbers that do not divide.
  """
  load = checked_load(load)
  policy = as_choice(PlacementPolicy, "policy", policy)
  _check_slots(load.shape[1], spare, devices)
  if policy == PlacementPolicy.GLOBAL:
    devices, groups = Devices(devices.count), 1
  _check_groups(load.shape[1], groups, devices)
  # Experts in the order of nodes, whole groups together.
  by_node = _experts_of_groups(pack_evenly(_group_sums(load, groups), devices.nodes), load.shape[1])
  of_node = np.take_along_axis(load, by_node, axis=1).reshape(-1, load.shape[1] // devices.nodes)
  logical, count = replicate_experts(of_node, (load.shape[1] + spare) // devices.nodes)
  borne = np.take_along_axis(of_node / count.astype(np.float32), logical, axis=1)
  order = pack_evenly(borne, devices.count // devices.nodes)
  slots = np.take_along_axis(logical, order, axis=1).reshape(len(load), devices.nodes, -1)
  first = np.arange(devices.nodes)[:, None] * of_node.shape[1]
  slots = np.take_along_axis(by_node, (slots + first).reshape(len(load), -1), axis=1)
  return placement_of(slots, load.shape[1])


def place_by_moving(
  load: np.ndarray, devices: Devices, *, groups: int = 1, base: np.ndarray | None = None
) -> np.ndarray:
  """Returns (X, E) int32: the expert that each of the E slots is to hold, a permutation.

  With several groups a permutation keeps each of them together, in places that a group can have:
  that of group-limited routing reads groups off the ids. Whole groups go to devices where a device
  holds whole groups; where a group spans devices, groups go to nodes and experts to the devices of
  their group. An expert hotter than a device's share stays a bottleneck: that takes replicas.

  Args:
    load: (X, E) non-negative.
    devices: where; nodes matter only where a group spans devices.
    groups: expert groups, of consecutive ids.
    base: (X, devices), what devices carry besides; nothing by default.

  Raises:
    UserError: loads that are no loads, or numbers that do not divide.
  """
  load = checked_load(load)
  num_experts = load.shape[1]
  _check_slots(num_experts, 0, devices)
  if groups == 1:
    return pack_evenly(load, devices.count, base)
  _divides("expert groups", groups, num_experts, "experts")
  sums = _group_sums(load, groups)
  if groups % devices.count == 0:
    return _experts_of_groups(pack_evenly(sums, devices.count, base), num_experts)
  _divides("expert groups", groups, devices.count, "devices")
  if groups % devices.nodes == 0:
    group_order = pack_evenly(sums, devices.nodes)
  else:
    group_order = np.tile(np.arange(groups, dtype=np.int32), (len(load), 1))
  experts = _experts_of_groups(group_order, num_experts)
  of_group = np.take_along_axis(load, experts, axis=1).reshape(-1, num_experts // groups)
  own_base = None if base is None else base.reshape(len(of_group), -1)
  within = pack_evenly(of_group, devices.count // groups, own_base).reshape(len(load), groups, -1)
  slots = within + np.arange(groups, dtype=np.int32)[:, None] * of_group.shape[1]
  return np.take_along_axis(experts, slots.reshape(len(load), -1), axis=1)


def place_with_replicas(
  load: np.ndarray, devices: Devices, *, spare: int, groups: int = 1
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (order, copied): a move like `place_by_moving`'s, and what spare slots hold after it.

  What training wants: every device has E / devices experts of its own, whose weights and optimiser
  memory it keeps, and fetches only the `spare` / devices copies. `place_replicas` is free to put
  all replicas of an expert elsewhere. Copies are placed first, hottest first and not twice on a
  device; experts then even out what they leave.

  Args:
    load: (X, E) non-negative.
    devices: where.
    spare: slots for copies over all devices, a multiple of their number.
    groups: expert groups, see `place_by_moving`.

  Returns:
    order: (X, E) int32, the expert that each place is to hold.
    copied: (X, spare) int32, the place, after the move, of the expert that each spare slot holds.

  Raises:
    UserError: loads that are no loads, or numbers that do not divide.
  """
  load, num_experts = checked_load(load), np.shape(load)[1]
  if spare % devices.count:
    raise UserError(
      f"{spare} spare slots are refused: {devices.count} devices need as many each; the nearest is"
      f" {max(1, round(spare / devices.count)) * devices.count}"
    )
  logical, count = replicate_experts(load, num_experts + spare)
  borne = load / count.astype(np.float32)
  copies = [
    _spread_copies(own, weight, devices.count)
    for own, weight in zip(logical[:, num_experts:], borne, strict=True)
  ]
  base = np.take_along_axis(borne, np.stack(copies), axis=1)
  base = base.reshape(len(load), devices.count, -1).sum(axis=-1)
  order = place_by_moving(borne, devices, groups=groups, base=base)
  place = np.argsort(order, axis=1).astype(np.int32)
  return order, np.take_along_axis(place, np.stack(copies), axis=1)


def _spread_copies(copies: np.ndarray, borne: np.ndarray, count: int) -> np.ndarray:
  """Returns the experts (spare,) in the order of devices, hottest first to the least loaded."""
  held, carried = [[] for _ in range(count)], np.zeros(count, np.float32)
  for expert in sorted(copies, key=lambda e: (-borne[e], e)):
    room = [d for d in range(count) if len(held[d]) < len(copies) // count]
    device = min(room, key=lambda d: (expert in held[d], carried[d]))
    held[device].append(expert)
    carried[device] += borne[expert]
  return np.array(held, np.int32).reshape(-1)


def placement_of(physical_to_logical: np.ndarray, num_experts: int) -> ExpertPlacement:
  """Returns the tables of (X, P) experts by slot; replicas are numbered in the order of slots.

  Raises:
    UserError: an expert without a slot.
  """
  rows, num_physical = physical_to_logical.shape
  replicas = np.zeros((rows, num_experts), np.int32)
  slots = np.full((rows, num_experts, num_physical), -1, np.int32)
  for physical in range(num_physical):
    expert = physical_to_logical[:, physical]
    every = np.arange(rows)
    slots[every, expert, replicas[every, expert]] = physical
    replicas[every, expert] += 1
  if not replicas.all():
    layer, expert = np.argwhere(replicas == 0)[0]
    raise UserError(
      f"expert {expert} of layer {layer} has no slot: every expert needs at least one"
    )
  return ExpertPlacement(
    physical_to_logical.astype(np.int32), slots[..., : replicas.max()], replicas
  )


def device_loads(load: np.ndarray, physical_to_logical: np.ndarray, count: int) -> np.ndarray:
  """Returns (X, devices) float64, what each device carries if replicas share a load evenly.

  Args:
    load: (X, E).
    physical_to_logical: (X, P) experts by slot; the identity for experts where they were born.
    count: devices.
  """
  load = checked_load(load).astype(np.float64)
  replicas = np.stack([np.bincount(row, minlength=load.shape[1]) for row in physical_to_logical])
  borne = np.take_along_axis(load / np.maximum(replicas, 1), physical_to_logical, axis=1)
  return borne.reshape(len(load), count, -1).sum(axis=-1)


def imbalance(loads: np.ndarray) -> np.ndarray:
  """Returns (X,) the largest over the mean of (X, devices) loads; 1 without any load."""
  mean = loads.mean(axis=-1)
  return np.where(mean > 0, loads.max(axis=-1) / np.where(mean > 0, mean, 1.0), 1.0)


def checked_load(load: np.ndarray) -> np.ndarray:
  """Returns loads (X, E) as float32.

  Raises:
    UserError: another number of axes, or a load that is negative or not finite.
  """
  load = np.asarray(load, np.float32)
  if load.ndim != 2:
    raise UserError(f"load has shape {load.shape}; expected (layers, experts)")
  bad = ~np.isfinite(load) | (load < 0)
  if bad.any():
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    raise UserError(f"load{list(where)} = {load[where]} is refused: it must be 0 or greater")
  return load


def nearest_divisor(number: int, wanted: int) -> int:
  """Returns the divisor of `number` closest to `wanted`, the smaller of two."""
  divisors = (d for d in range(1, number + 1) if number % d == 0)
  return min(divisors, key=lambda d: (abs(d - wanted), d))


def _group_sums(load: np.ndarray, groups: int) -> np.ndarray:
  return load.reshape(len(load), groups, -1).sum(axis=-1)


def _experts_of_groups(group_order: np.ndarray, num_experts: int) -> np.ndarray:
  """Returns (X, E) int32, the experts of (X, groups) groups in that order."""
  size = num_experts // group_order.shape[1]
  experts = group_order[..., None] * size + np.arange(size, dtype=np.int32)
  return experts.reshape(len(group_order), num_experts)


def _check_slots(num_experts: int, spare: int, devices: Devices) -> None:
  if spare < 0:
    raise UserError(f"spare = {spare} is refused: it must be 0 or greater")
  slots = num_experts + spare
  if slots % devices.count:
    further = -slots % devices.count
    raise UserError(
      f"{num_experts} experts and {spare} spare slots are {slots}, which {devices.count} devices"
      f" cannot share evenly; the nearest is {spare + further} spare slots"
    )


def _check_groups(num_experts: int, groups: int, devices: Devices) -> None:
  _divides("expert groups", groups, num_experts, "experts")
  _divides("nodes", devices.nodes, groups, "expert groups")


def _divides(name: str, divisor: int, number: int, of: str) -> None:
  if divisor < 1 or number % divisor:
    raise UserError(
      f"{divisor} {name} are refused: they must divide the {number} {of}; the nearest that do are"
      f" {nearest_divisor(number, divisor)}"
    )
