"""Metrics of what was lost."""

import jax.numpy as jnp
import numpy as np
import pytest
from analysis.router_metrics.drawn import draw_routing

from moe_jax.analysis.router_metrics import drops
from moe_jax.errors import UserError


def test_hand_solved_drops():
  # Tokens: all kept; second lost; both lost; second not asked and first kept; padding.
  asked = jnp.array([[1, 1], [1, 1], [1, 1], [1, 0], [0, 0]], bool)
  kept = jnp.array([[1, 1], [1, 0], [0, 0], [1, 0], [0, 0]], bool)
  mask = jnp.array([1, 1, 1, 1, 0], bool)
  np.testing.assert_allclose(drops.dropped_assignment_fraction(asked, kept), 3 / 7)
  np.testing.assert_allclose(drops.dropped_token_fraction(asked, kept, mask), 1 / 4)
  np.testing.assert_allclose(drops.dropped_fraction_by_choice(asked, kept), [1 / 4, 2 / 3])


def test_one_choice_makes_both_fractions_equal():
  _, asked, mask = draw_routing(top_k=1)
  asked = np.repeat(mask[..., None], 1, axis=-1)
  kept = asked & (np.random.default_rng(0).random(asked.shape) < 0.6)
  by_assignment = drops.dropped_assignment_fraction(asked, kept)
  assert 0 < by_assignment < 1
  np.testing.assert_allclose(drops.dropped_token_fraction(asked, kept, mask), by_assignment)
  np.testing.assert_allclose(drops.dropped_fraction_by_choice(asked, kept), [by_assignment])


def test_nothing_asked_drops_nothing():
  nothing = jnp.zeros((3, 2), bool)
  assert drops.dropped_assignment_fraction(nothing, nothing) == 0.0
  assert drops.dropped_token_fraction(nothing, nothing, jnp.zeros(3, bool)) == 0.0


@pytest.mark.parametrize(("num_experts", "expected"), [(8, 0.023), (64, 0.070)])
def test_random_routing_at_capacity_factor_one_drops(num_experts, expected):
  # The expected values are given to two digits.
  fraction = drops.expected_dropped_fraction(2048, num_experts, 2048 // num_experts)
  np.testing.assert_allclose(fraction, expected, atol=5e-4)


def test_expected_drops_of_two_choices_equal_a_simulation():
  S, E, K, C, draws = 16, 4, 2, 7, 4000
  ranks = np.argsort(np.random.default_rng(0).random((draws, S, E)), axis=-1)
  loads = (ranks < K).sum(axis=1)
  simulated = np.maximum(loads - C, 0).sum(axis=1).mean() / (S * K)
  # Standard error of the mean about 1.5 %.
  np.testing.assert_allclose(drops.expected_dropped_fraction(S, E, C, K), simulated, rtol=0.06)


def test_a_token_asks_each_expert_when_all_are_chosen():
  assert drops.expected_dropped_fraction(10, 3, 10, top_k=3) == 0.0
  np.testing.assert_allclose(drops.expected_dropped_fraction(10, 3, 4, top_k=3), 0.6)


def test_capacity_utilization_is_one_less_padding():
  np.testing.assert_allclose(drops.capacity_utilization(12, 16), 0.75)
  assert drops.capacity_utilization(0, 0) == 0.0


def test_experts_per_token_of_a_plan_in_any_order():
  # Two groups of three tokens; expert-major order as expert choice gives it.
  token = jnp.array([[0, 2, 0, 2], [1, 1, 1, 0]])
  valid = jnp.array([[1, 1, 1, 0], [1, 1, 1, 0]], bool)
  counts = drops.experts_per_token(token, valid, 3)
  np.testing.assert_array_equal(counts, [[2, 0, 1], [0, 3, 0]])
  np.testing.assert_array_equal(drops.experts_per_token_histogram(counts), [3, 1, 1, 1, 0])
  np.testing.assert_allclose(drops.unrouted_fraction(counts), 1 / 2)
  mask = jnp.array([[1, 0, 1], [1, 1, 1]], bool)
  np.testing.assert_allclose(drops.unrouted_fraction(counts, mask), 2 / 5)


def test_histogram_bins_hold_their_names():
  counts = jnp.arange(8)
  histogram = drops.experts_per_token_histogram(counts)
  assert drops.EXPERTS_PER_TOKEN_BINS == ("0", "1", "2", "3-4", ">4")
  np.testing.assert_array_equal(histogram, [1, 1, 1, 2, 3])


def test_experts_that_pick_tokens_at_random_leave_the_expected_fraction_unrouted():
  S, E, C, draws = 12, 4, 3, 2000
  ranks = np.argsort(np.random.default_rng(0).random((draws, E, S)), axis=-1)
  unrouted = ~(ranks < C).any(axis=1)
  # Standard error of 24,000 nearly independent draws of probability 0.32: 0.003.
  expected = drops.expected_unrouted_fraction(S, E, C)
  np.testing.assert_allclose(unrouted.mean(), expected, atol=0.012)
  with pytest.raises(UserError, match="capacity = 13"):
    drops.expected_unrouted_fraction(S, E, 13)
