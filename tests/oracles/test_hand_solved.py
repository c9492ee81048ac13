"""The oracles give what was worked out by hand in hand_cases."""

import numpy as np
import pytest
from oracles import hand_cases, losses, metrics, routing

# Expected entropies and the padded z-loss are written with six decimals.
DECIMALS = 1e-6


def by_name(cases):
  """Return parametrize arguments that show a case's name."""
  return [pytest.param(case, id=case.name) for case in cases]


def solve(case):
  """Route one case; return its only group in a list."""
  draws = case.select_draws
  return routing.route(
    case.logits,
    token_mask=case.mask,
    select_draws=None if draws is None else [draws],
    **case.options,
  )


def measure(case, groups):
  """Return every metric of a routed case."""
  counts = metrics.load(metrics.all_assignments(groups), 3)
  return {
    "load": tuple(counts),
    "load_entropy": metrics.load_entropy(counts),
    "max_violation": metrics.max_violation(counts),
    "dropped_assignments": metrics.dropped_assignments(metrics.all_assignments(groups)),
    "dropped_token_fraction": metrics.dropped_tokens(groups, case.mask),
    "dead_experts": metrics.dead_experts(counts),
    "router_confidence": metrics.router_confidence(groups, case.mask),
    "capacity_utilisation": metrics.capacity_utilisation(groups),
    "slots_per_assignment": metrics.slots_per_assignment(
      num_groups=1,
      num_experts=3,
      capacity=case.options["capacity"],
      top_k=case.options["top_k"],
      num_real_tokens=sum(case.token_mask),
    ),
  }


@pytest.mark.parametrize("case", by_name(hand_cases.CASES))
def test_routing_equals_the_hand_solution(case):
  (group,) = solve(case)
  real = case.mask[0]
  np.testing.assert_allclose(group.scores[real], np.array(case.scores)[real], rtol=0, atol=1e-15)
  np.testing.assert_array_equal(group.dispatch, case.dispatch[0])
  # A handful of float64 operations on numbers below 1.
  np.testing.assert_allclose(group.combine, case.combine[0], rtol=0, atol=1e-14)
  kept = {(one.token, one.expert, one.slot) for one in group.assignments if one.slot >= 0}
  assert kept == {(token, expert, slot) for token, expert, slot, _ in case.kept}
  dropped = {(one.token, one.expert) for one in group.assignments if one.slot < 0}
  assert dropped == set(case.dropped)


@pytest.mark.parametrize("case", by_name(case for case in hand_cases.CASES if case.losses))
def test_losses_equal_the_hand_solution(case):
  (group,) = solve(case)
  selected = [[routing.top_experts(row, case.options["top_k"]) for row in group.scores]]
  for name, expected in case.losses.items():
    arguments = hand_cases.LOSSES[name]
    if name.startswith("z"):
      value = losses.router_z_loss(case.logits, token_mask=case.mask, **arguments)
    else:
      value = losses.load_balance_loss([group.scores], selected, token_mask=case.mask, **arguments)
    assert value == pytest.approx(expected, abs=DECIMALS), name


@pytest.mark.parametrize("case", by_name(case for case in hand_cases.CASES if case.metrics))
def test_metrics_equal_the_hand_solution(case):
  measured = measure(case, solve(case))
  for name, expected in case.metrics.items():
    assert measured[name] == pytest.approx(expected, abs=DECIMALS), name


def test_drop_orders_drop_different_tokens():
  assert hand_cases.CHOICE_MAJOR.logits.tolist() == hand_cases.TOKEN_MAJOR.logits.tolist()
  assert hand_cases.CHOICE_MAJOR.kept != hand_cases.TOKEN_MAJOR.kept


def test_a_misspelt_option_is_refused():
  with pytest.raises(ValueError, match="choice-major"):
    routing.route_group(np.zeros((3, 3)), top_k=1, capacity=1, drop_order="choice-major")
