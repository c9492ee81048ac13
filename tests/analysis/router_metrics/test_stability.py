"""Saturation and fluctuation over checkpoints."""

import numpy as np
import pytest
from analysis.router_metrics.drawn import E, K, draw_routing
from oracles import router_metrics

from moe_jax.analysis.router_metrics import stability
from moe_jax.errors import UserError


def test_saturation_equals_loops():
  mask = draw_routing()[2]
  early, final = (draw_routing(seed, shape=(4, 9))[0] for seed in (1, 2))
  early, final = np.where(early < 0, 0, early), np.where(final < 0, 0, final)
  expected = router_metrics.saturation(early[mask].tolist(), final[mask].tolist())
  np.testing.assert_allclose(stability.router_saturation(early, final, mask), expected, rtol=1e-6)


def test_hand_solved_saturation():
  early, final = np.array([[0, 1], [2, 3]]), np.array([[1, 0], [3, 4]])
  np.testing.assert_allclose(stability.router_saturation(early, final), (1 + 0.5) / 2)
  np.testing.assert_allclose(stability.router_saturation(early[:, :1], final[:, :1]), 0.0)
  np.testing.assert_allclose(stability.router_saturation(final, final), 1.0)


def test_unrelated_routers_show_the_baselines():
  rng = np.random.default_rng(0)
  a, b = (np.argsort(rng.random((4000, E)), axis=-1)[:, :K] for _ in range(2))
  # Standard errors: 0.004 of an overlap, 0.005 of a change.
  expected = stability.expected_saturation(E, K)
  np.testing.assert_allclose(stability.router_saturation(a, b), expected, atol=0.015)
  firsts = np.stack([a[:, 0], b[:, 0]])
  fluctuation = stability.routing_fluctuation(firsts)
  np.testing.assert_allclose(fluctuation, [stability.expected_fluctuation(E)], atol=0.02)


def test_hand_solved_fluctuation():
  # Token 0 never moves, 1 moves once, 2 comes back to where it was, 3 is padding.
  firsts = np.array([[0, 1, 2, 0], [0, 3, 5, 1], [0, 3, 2, 2]])
  mask = np.array([True, True, True, False])
  np.testing.assert_allclose(stability.routing_fluctuation(firsts, mask), [2 / 3, 1 / 3])
  np.testing.assert_allclose(stability.settled_fraction(firsts, mask), [1 / 3, 2 / 3, 1])


def test_settled_fraction_equals_loops():
  firsts = np.random.default_rng(0).integers(0, 2, (4, 50))
  expected = router_metrics.settled(firsts.tolist())
  np.testing.assert_allclose(stability.settled_fraction(firsts), expected, rtol=1e-6)


def test_inputs_that_do_not_fit_are_refused():
  with pytest.raises(UserError, match="same tokens and the same K"):
    stability.router_saturation(np.zeros((2, 2)), np.zeros((2, 3)))
  with pytest.raises(UserError, match="holds 1 checkpoints"):
    stability.routing_fluctuation(np.zeros((1, 4)))
