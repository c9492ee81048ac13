"""From the placement of now to a better one: only where it pays, with as few moves as it takes."""

import dataclasses

import numpy as np
import scipy.optimize

from moe_jax.moe.placement_balance import (
  Devices,
  device_loads,
  imbalance,
  place_by_moving,
  place_with_replicas,
)


@dataclasses.dataclass(frozen=True)
class PlacementChange:
  """What X layers change to.

  Attributes:
    order: (X, E) int32, the expert of now that each place is to hold.
    copied: (X, spare) int32, the place, after the move, whose expert each spare slot holds.
    before, after: (X,) float64, the largest over the mean load of a device.
  """

  order: np.ndarray
  copied: np.ndarray
  before: np.ndarray
  after: np.ndarray

  @property
  def pays(self) -> np.ndarray:
    """(X,) bool, the layers that change at all."""
    return self.after < self.before


def better_placement(
  load: np.ndarray, copied: np.ndarray, devices: Devices, *, groups: int = 1, min_gain: float = 0.0
) -> PlacementChange:
  """Returns how experts and copies are to be placed; layers stay where that gains too little.

  Args:
    load: (X, E) of the experts by place.
    copied: (X, spare) int32, what spare slots hold now.
    devices: where.
    groups: expert groups, see `place_by_moving`.
    min_gain: the share by which the largest load of a device is to fall, within [0, 1).

  Raises:
    UserError: see `place_by_moving` and `place_with_replicas`.
  """
  identity = np.tile(np.arange(load.shape[1], dtype=np.int32), (len(load), 1))
  order, copies = _fresh(load, copied.shape[1], devices, groups)
  before, after = (
    imbalance(device_loads(load, _held(*tables, devices.count), devices.count))
    for tables in ((identity, copied), (order, copies))
  )
  pays = (after < before) & (after <= (1 - min_gain) * before)
  place = np.argsort(order, axis=1).astype(np.int32)
  return PlacementChange(
    np.where(pays[:, None], order, identity),
    np.where(pays[:, None], np.take_along_axis(place, copies, axis=1), copied),
    before,
    np.where(pays, after, before),
  )


def _fresh(load, spare: int, devices: Devices, groups: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns experts by place and by spare slot, both numbered as now."""
  if spare == 0:
    order, copies = (
      place_by_moving(load, devices, groups=groups),
      np.zeros((len(load), 0), np.int32),
    )
  else:
    order, copied = place_with_replicas(load, devices, spare=spare, groups=groups)
    copies = np.take_along_axis(order, copied, axis=1)
  if groups > 1:
    return order, copies
  rows = [_least_moves(*row, devices.count) for row in zip(order, copies, strict=True)]
  return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])


def _least_moves(order: np.ndarray, copies: np.ndarray, count: int):
  """Renumbers devices, and places on them, so that as many experts as can be stay where they are.

  Devices are alike, so this changes no load.
  """
  packs, size = order.reshape(count, -1), len(order) // count
  staying = np.stack([np.bincount(pack // size, minlength=count) for pack in packs])
  device, pack = scipy.optimize.linear_sum_assignment(staying.T, maximize=True)
  result = np.full_like(order, -1)
  for d, p in zip(device, pack, strict=True):
    own = result[d * size : (d + 1) * size]
    stays = packs[p] // size == d
    own[packs[p][stays] % size] = packs[p][stays]
    own[own < 0] = packs[p][~stays]
  return result, copies.reshape(count, -1)[pack].reshape(-1)


def _held(order: np.ndarray, copies: np.ndarray, count: int) -> np.ndarray:
  """Returns (X, P) int32: what every device holds, its own experts first."""
  layers = len(order)
  both = order.reshape(layers, count, -1), copies.reshape(layers, count, -1)
  return np.concatenate(both, axis=-1).reshape(layers, -1)
