"""Changing a placement: where it pays, with few moves, and with copies that even loads out."""

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.moe.placement_balance import Devices, device_loads, imbalance, place_with_replicas
from moe_jax.moe.placement_change import better_placement

E = 8
# Both hot experts of the first layer share a device; the second layer is balanced.
LOAD = np.array([[9.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0], [3.0] * E])
NO_COPIES = np.zeros((2, 0), np.int32)


def zipf(layers: int = 4) -> np.ndarray:
  rng = np.random.default_rng(0)
  return np.stack([rng.permutation(1.0 / np.arange(1, 65)) for _ in range(layers)])


def held(load, order, copied, count):
  """Returns the loads by place after the move, and what devices hold then."""
  own = np.tile(np.arange(load.shape[1]).reshape(count, -1), (len(load), 1, 1))
  both = np.concatenate([own, copied.reshape(len(load), count, -1)], axis=-1)
  return np.take_along_axis(load, order, axis=1), both.reshape(len(load), -1)


@pytest.mark.parametrize("min_gain, pays", [(0.3, True), (0.5, False)])
def test_only_what_pays_is_changed(min_gain, pays):
  # From 17 / 6 to 10 / 6 the largest load falls by 41 %.
  change = better_placement(LOAD, NO_COPIES, Devices(4), min_gain=min_gain)
  assert change.pays.tolist() == [pays, False]
  assert np.array_equal(change.order, np.tile(np.arange(E), (2, 1))) != pays
  np.testing.assert_allclose(change.before, [17 / 6, 1.0])
  np.testing.assert_allclose(change.after, [10 / 6 if pays else 17 / 6, 1.0])


def test_as_many_experts_as_can_be_stay_where_they_are():
  change = better_placement(LOAD, NO_COPIES, Devices(4))
  # One of the hot experts leaves, and what it is paired with makes room.
  assert np.sum(change.order[0] != np.arange(E)) <= 4
  again = better_placement(LOAD[:, change.order[0]], NO_COPIES, Devices(4))
  assert not again.pays.any()


def test_copies_even_out_zipf_loads_beside_experts_that_stay_whole():
  load = zipf()
  order, copied = place_with_replicas(load, Devices(8), spare=16)
  assert (imbalance(device_loads(*held(load, order, copied, 8), 8)) <= 1.1).all()
  np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(64), (4, 1)))


def test_a_change_to_copies_is_what_it_predicts():
  load = zipf()
  change = better_placement(load, np.zeros((4, 16), np.int32), Devices(8))
  reached = imbalance(device_loads(*held(load, change.order, change.copied, 8), 8))
  np.testing.assert_allclose(reached, change.after)
  assert (change.before > 1.5).all() and (change.after <= 1.1).all()


def test_groups_stay_together_beside_copies():
  load = zipf()
  change = better_placement(load, np.zeros((4, 16), np.int32), Devices(8), groups=16)
  groups = change.order.reshape(4, 16, 4) // 4
  assert (groups == groups[..., :1]).all()
  assert (change.after < change.before).all()


def test_spare_slots_that_devices_cannot_share_are_refused():
  with pytest.raises(UserError, match="12 spare slots are refused: 8 devices .* nearest is 16"):
    place_with_replicas(zipf(), Devices(8), spare=12)
