"""Devices that tokens visit."""

import numpy as np
import pytest
from analysis.router_metrics.drawn import E, K, draw_routing
from oracles import router_metrics

from moe_jax.analysis.router_metrics import communication
from moe_jax.errors import UserError

P = 4


def test_distinct_devices_equal_loops():
  expert, asked, _ = draw_routing()
  expected = router_metrics.distinct_devices(router_metrics.tokens_of(expert, asked), E // P)
  found = communication.mean_distinct_devices(expert, E, P, asked)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_random_routing_visits_the_expected_devices():
  rng = np.random.default_rng(0)
  expert = np.argsort(rng.random((6000, E)), axis=-1)[:, :K]
  expected = communication.expected_distinct_devices(E, K, P)
  # Standard error 0.007.
  found = communication.mean_distinct_devices(expert, E, P)
  np.testing.assert_allclose(found, expected, atol=0.03)
  away = communication.cross_device_fraction(expert, rng.integers(0, P, 6000), E, P)
  expected = communication.expected_cross_device_fraction(P)
  np.testing.assert_allclose(away, expected, atol=0.015)


def test_extremes():
  assert communication.expected_distinct_devices(8, 1, 8) == 1.0
  assert communication.expected_distinct_devices(8, 8, 4) == 4.0
  assert communication.expected_distinct_devices(8, 3, 1) == 1.0
  expert = np.array([[0, 1], [6, 7]])
  home = np.array([0, 3])
  assert communication.cross_device_fraction(expert, home, E, P) == 0.0
  assert communication.cross_device_fraction(expert, home[::-1], E, P) == 1.0
  assert communication.mean_distinct_devices(expert, E, P) == 1.0


def test_load_of_devices():
  counts = np.arange(8)
  np.testing.assert_array_equal(communication.device_counts(counts, P), [1, 5, 9, 13])


def test_devices_that_do_not_divide_the_experts_are_refused():
  with pytest.raises(UserError, match="num_devices = 3 .* num_experts = 8, for example 2"):
    communication.device_counts(np.arange(8), 3)
  with pytest.raises(UserError, match="token_device has shape"):
    communication.cross_device_fraction(np.zeros((2, 1), int), np.zeros(3, int), E, P)
