"""Repetition of experts on consecutive tokens."""

import numpy as np
import pytest
from analysis.router_metrics.drawn import B, E, L, draw_routing
from oracles import router_metrics

from moe_jax.analysis.router_metrics import balance
from moe_jax.analysis.router_metrics import repetition as rep
from moe_jax.errors import UserError


@pytest.mark.parametrize("choices", [1, 2])
def test_pairs_of_one_text_equal_loops(choices):
  expert, _, mask = draw_routing(top_k=2)
  expert = expert[..., :choices]
  segments = np.repeat([[0] * 4 + [1] * (L - 4)], B, axis=0)
  rows = []
  for row in range(B):
    texts = [expert[row, t].tolist() if mask[row, t] else None for t in range(L)]
    rows += [texts[:4], texts[4:]]
  found = rep.repetition(*rep.repetition_counts(expert, mask, segments))
  np.testing.assert_allclose(found, router_metrics.repetition(rows), rtol=1e-6)


def test_hand_solved_first_and_any_choice():
  expert = np.array([[[0, 1], [0, 2], [3, 0], [4, 5]]])
  repeats, pairs = rep.repetition_counts(expert[..., :1])
  assert (repeats[0], pairs[0]) == (1, 3)
  repeats, pairs = rep.repetition_counts(expert)
  assert (repeats[0], pairs[0]) == (2, 3)


def test_baselines():
  np.testing.assert_allclose(rep.expected_repetition(8), 1 / 8)
  # Mixtral, arXiv 2401.04088 Table 5: 46 % for two of eight.
  np.testing.assert_allclose(rep.expected_repetition(8, 2), 0.4643, atol=1e-4)
  assert rep.expected_repetition(4, 3) == 1.0


def test_unequal_load_alone_repeats_without_a_lift():
  rng = np.random.default_rng(0)
  expert = rng.choice(E, (40, 100, 1), p=np.arange(1, E + 1) / 36)
  observed = rep.repetition(*rep.repetition_counts(expert))
  baseline = rep.load_repetition(balance.expert_counts(expert, E))
  assert baseline > 1.25 * rep.expected_repetition(E)
  # Standard error of 3,960 pairs: 3.5 %.
  np.testing.assert_allclose(rep.repetition_lift(observed, baseline), 1.0, atol=0.12)


def test_interval_covers_and_shrinks_with_rows():
  rng = np.random.default_rng(0)
  few, many = rng.binomial(50, 0.3, 20), rng.binomial(50, 0.3, 500)
  low, high = rep.repetition_interval(few, np.full(20, 50), seed=1)
  assert low < few.mean() / 50 < high
  narrow = rep.repetition_interval(many, np.full(500, 50), seed=1)
  assert narrow[1] - narrow[0] < 0.4 * (high - low)
  assert rep.repetition_interval(few, np.full(20, 50), seed=1) == (low, high)


def test_inputs_that_do_not_fit_are_refused():
  with pytest.raises(UserError, match="pairs_B holds no pair"):
    rep.repetition_interval(np.zeros(3), np.zeros(3), seed=0)
  with pytest.raises(UserError, match="confidence = 95"):
    rep.repetition_interval(np.ones(3), np.ones(3), seed=0, confidence=95)
  with pytest.raises(UserError, match="segment_ids have shape"):
    rep.repetition_counts(np.zeros((2, 3, 1), int), None, np.zeros(3, int))
