"""Which experts tokens use together."""

import numpy as np
import pytest
from analysis.router_metrics.drawn import E, K, draw_routing
from oracles import router_metrics

from moe_jax.analysis.router_metrics import coactivation as co
from moe_jax.errors import UserError


def test_fractions_equal_loops():
  expert, asked, _ = draw_routing()
  expected = router_metrics.coactivation(router_metrics.tokens_of(expert, asked), E)
  table = co.coactivation(co.coactivation_counts(expert, E, asked))
  np.testing.assert_allclose(table, expected, rtol=1e-6)


def test_rows_sum_to_the_other_choices():
  expert = np.argsort(np.random.default_rng(0).random((60, E)), axis=-1)[:, :K]
  counts = co.coactivation_counts(expert, E)
  np.testing.assert_array_equal(counts, counts.T)
  np.testing.assert_allclose(co.coactivation(counts).sum(axis=1), K - 1, rtol=1e-6)


def test_hand_solved_table_is_not_symmetric():
  # Expert 0 always comes with 1; 1 also comes with 2.
  counts = co.coactivation_counts(np.array([[0, 1], [1, 2], [2, 1]]), 4)
  expected = [[0, 1, 0, 0], [1 / 3, 0, 2 / 3, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
  np.testing.assert_allclose(co.coactivation(counts), expected, rtol=1e-6)


def test_adjacent_ranks_miss_the_first_and_third_choice():
  expert = np.array([[0, 1, 2]])
  everyone = co.coactivation(co.coactivation_counts(expert, 3))
  adjacent = co.coactivation(co.coactivation_counts(expert, 3, pairs="adjacent_ranks"))
  np.testing.assert_array_equal(everyone, [[0, 1, 1], [1, 0, 1], [1, 1, 0]])
  np.testing.assert_array_equal(adjacent, [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


def test_random_routing_shows_the_baseline():
  expert = np.argsort(np.random.default_rng(1).random((8000, E)), axis=-1)[:, :K]
  table = np.array(co.coactivation(co.coactivation_counts(expert, E)))
  off_diagonal = table[~np.eye(E, dtype=bool)]
  # 3,000 tokens an expert: standard error 0.008 of each entry.
  np.testing.assert_allclose(off_diagonal, co.expected_coactivation(E, K), atol=0.035)


def test_unknown_pairs_are_refused():
  with pytest.raises(UserError, match="adjacent_ranks"):
    co.coactivation_counts(np.array([[0, 1]]), 2, pairs="adjacent_rank")
