"""`route` solves the problems of three tokens and three experts that were solved by hand."""

import jax
import numpy as np
import pytest
from comparison import relative_error
from oracles import hand_cases

from moe_jax.moe import BalanceFraction, RoutingConfig, route

# The hand solutions have six decimals.
TOLERANCE = 1e-5
ALL = hand_cases.CASES
METRIC_NAMES = {
  "dropped_assignments": "dropped_fraction",
  "capacity_utilisation": "capacity_utilization",
}
FRACTIONS = {
  "switch": BalanceFraction.FIRST_CHOICE,
  "gshard": BalanceFraction.FIRST_CHOICE,
  "all_choices": BalanceFraction.ALL_CHOICES,
}


def named(cases):
  return [pytest.param(case, id=case.name) for case in cases]


def solve(case, monkeypatch, **changes):
  """Routes a case; its uniform draws take the place of those of the key."""
  random = case.select_draws is not None
  if random:
    draws = np.array([case.select_draws], np.float32)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: draws.reshape(shape))
  config = RoutingConfig(num_experts=3, **case.options, **changes)
  logits = case.logits.astype(np.float32)
  return route(logits, config, token_mask=case.mask, key=jax.random.key(0), train=random)


@pytest.mark.parametrize("case", named(ALL))
def test_placement_equals_the_hand_solution(case, monkeypatch):
  plan = solve(case, monkeypatch)
  np.testing.assert_array_equal(plan.dispatch_mask(), case.dispatch)
  assert relative_error(plan.combine_weights(), case.combine) <= TOLERANCE


@pytest.mark.parametrize("case", named(case for case in ALL if case.losses))
def test_losses_equal_the_hand_solution(case, monkeypatch):
  for name, expected in case.losses.items():
    arguments = hand_cases.LOSSES[name]
    fraction = FRACTIONS[arguments.get("kind", "switch")]
    padding = arguments.get("padding", "exclude")
    plan = solve(case, monkeypatch, balance_fraction=fraction, loss_padding=padding)
    actual = plan.losses["router_z" if name.startswith("z") else "load_balance"]
    assert relative_error(actual, expected) <= TOLERANCE, name


@pytest.mark.parametrize("case", named(case for case in ALL if case.metrics))
def test_metrics_equal_the_hand_solution(case, monkeypatch):
  plan = solve(case, monkeypatch)
  for name, expected in case.metrics.items():
    if name == "load":
      expected = np.array(expected) / sum(expected)
    actual = plan.metrics[METRIC_NAMES.get(name, name)]
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, err_msg=name)
