"""Metrics of load: hand-solved cases, extremes, loops, and the value at random."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from analysis.router_metrics.drawn import E, draw_routing
from oracles import metrics as oracle
from oracles import router_metrics

from moe_jax.analysis.router_metrics import balance
from moe_jax.errors import UserError
from moe_jax.moe.metrics import load_statistics

UNIFORM = jnp.full(E, 6, jnp.int32)
ONE_HOT = jnp.zeros(E, jnp.int32).at[3].set(48)
SKEWED = jnp.array([9, 0, 1, 4, 7, 20, 2, 5])

# Sums of eight float32 numbers.
TOLERANCE = 1e-6


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
  ("metric", "uniform", "one_hot"),
  [
    (balance.load_entropy, math.log(E), 0.0),
    (balance.normalized_load_entropy, 1.0, 0.0),
    (balance.effective_experts, E, 1.0),
    (balance.coefficient_of_variation, 0.0, math.sqrt(E - 1)),
    (balance.squared_coefficient_of_variation, 0.0, E - 1),
    (balance.max_violation, 0.0, E - 1),
    (balance.max_over_mean_load, 1.0, E),
    (balance.dead_experts, 0, E - 1),
  ],
)
def test_extremes(metric, uniform, one_hot):
  close(metric(UNIFORM), uniform)
  close(metric(ONE_HOT), one_hot)
  # A leading axis of layers stays.
  close(metric(jnp.stack([UNIFORM, ONE_HOT])), [uniform, one_hot])


def test_skewed_load_equals_loops():
  counts = np.asarray(SKEWED).tolist()
  close(balance.load_entropy(SKEWED), router_metrics.entropy(counts))
  close(balance.normalized_load_entropy(SKEWED), oracle.load_entropy(counts))
  close(balance.max_violation(SKEWED), oracle.max_violation(counts))
  close(balance.coefficient_of_variation(SKEWED), router_metrics.coefficient_of_variation(counts))
  close(balance.max_over_mean_load(SKEWED), balance.max_violation(SKEWED) + 1)
  close(jnp.sum(balance.load_fractions(SKEWED)), 1.0)


def test_definitions_agree_with_those_of_the_routing_core():
  core = load_statistics(balance.load_fractions(SKEWED))
  close(balance.normalized_load_entropy(SKEWED), core["load_entropy"])
  close(balance.max_violation(SKEWED), core["max_violation"])
  close(balance.dead_experts(SKEWED), core["dead_experts"])


def test_no_load_at_all():
  nothing = jnp.zeros(E, jnp.int32)
  for metric in (balance.load_entropy, balance.coefficient_of_variation, balance.max_violation):
    assert metric(nothing) == 0.0
  assert balance.dead_experts(nothing) == E


def test_counts_leave_out_padding_and_choices_that_were_not_made():
  expert, asked, _ = draw_routing()
  tokens = router_metrics.tokens_of(expert, asked)
  expected = [sum(e in experts for experts in tokens) for e in range(E)]
  np.testing.assert_array_equal(balance.expert_counts(expert, E, asked), expected)


def test_importance_sums_gates_before_drops():
  expert = jnp.array([[0, 2], [2, 1], [-1, 0]])
  gates = jnp.array([[0.75, 0.25], [0.5, 0.5], [jnp.nan, 0.3]])
  asked = jnp.array([[True, True], [True, False], [False, True]])
  close(balance.importance(expert, gates, 3, asked), [1.05, 0.0, 0.75])


def test_balanced_load_can_have_unbalanced_importance():
  expert, gates = jnp.array([[0], [1]]), jnp.array([[0.9], [0.1]])
  close(balance.coefficient_of_variation(balance.expert_counts(expert, 2)), 0.0)
  close(balance.coefficient_of_variation(balance.importance(expert, gates, 2)), 0.8)


def test_dead_experts_by_threshold():
  counts = jnp.array([0, 1, 9, 30])  # mean 10: a tenth of it is 1, which is not below
  assert balance.dead_experts(counts) == 1
  assert balance.dead_experts(counts, tau=0.1) == 1
  assert balance.dead_experts(counts, tau=0.2) == 2
  assert balance.dead_experts(counts, tau=0.95) == 3


def test_permanently_dead_is_judged_on_the_last_steps_alone():
  early, late = [1, 1, 0], [1, 0, 0]
  counts = jnp.array([early] * 8 + [late] * 2)
  assert balance.permanently_dead_experts(counts) == 2
  assert balance.permanently_dead_experts(counts, last_fraction=0.3) == 1


def test_normalized_balance_loss_is_one_at_uniform_and_can_hide_skew():
  close(balance.normalized_balance_loss(UNIFORM, jnp.ones(E)), 1.0)
  close(balance.normalized_balance_loss(ONE_HOT, ONE_HOT), E)
  skewed = balance.normalized_balance_loss(jnp.array([6, 4]), jnp.array([0.31, 0.69]))
  close(skewed, 2 * (0.6 * 0.31 + 0.4 * 0.69))
  assert skewed < 1


def test_random_assignments_show_the_expected_variation():
  draws = np.random.default_rng(0).multinomial(2048, [1 / 8] * 8, size=2000)
  squared = np.asarray(balance.squared_coefficient_of_variation(draws))
  # Relative standard error of a mean of 2,000 chi-square(7) draws: sqrt(2 / 7 / 2000) = 1.2 %.
  expected = balance.expected_squared_cv(2048, 8)
  np.testing.assert_allclose(squared.mean(), expected, rtol=0.05)
  close(balance.coefficient_of_variation_floor(2048, 8) ** 2, expected)


def test_layers_are_summarised_by_mean_and_maximum():
  summary = balance.summarize_layers(balance.max_violation(jnp.stack([UNIFORM, ONE_HOT])))
  close(summary["mean"], (E - 1) / 2)
  close(summary["max"], E - 1)


def test_values_out_of_range_are_refused():
  with pytest.raises(UserError, match="tau = -1"):
    balance.dead_experts(UNIFORM, tau=-1)
  with pytest.raises(UserError, match="last_fraction = 0"):
    balance.permanently_dead_experts(UNIFORM[None], last_fraction=0)
  with pytest.raises(UserError, match="expert holds 9; expected integers from 0 to 7"):
    balance.expert_counts(jnp.array([[9]]), E)
  with pytest.raises(UserError, match="expert holds 9"):
    balance.importance(jnp.array([[9]]), jnp.ones((1, 1)), E)
  with pytest.raises(UserError, match="asked has shape"):
    balance.expert_counts(jnp.array([[1]]), E, jnp.array([True]))
