"""The oracles of capacity, losses and metrics meet values known in closed form or from papers."""

import math

import numpy as np
import pytest
from oracles import capacity, losses, metrics, routing, scores


def test_sqrt_softplus_stays_positive_where_softplus_underflows():
  assert scores.sqrt_softplus(0.0) == pytest.approx(math.sqrt(math.log(2.0)))
  # Of a derivative 1/2 / (2 sqrt(ln 2)).
  assert scores.sqrt_softplus_slope(0.0) == pytest.approx(0.25 / math.sqrt(math.log(2.0)))
  assert scores.sqrt_softplus(-1e9) == 2.0**-63
  assert scores.sqrt_softplus_slope(-1e9) == 0.0


def round_capacity(**changes):
  """Return the capacity of 2,000 tokens, 48 experts, top-2, factor 1.25, with some changes."""
  options = {
    "tokens_per_group": 2000,
    "num_experts": 48,
    "top_k": 2,
    "capacity_factor": 1.25,
    "convention": "per_assignment",
  }
  return capacity.capacity(**(options | changes))


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    # 1.25 * 2000 / 48 = 52.08 and twice that, 104.17.
    ({"convention": "per_token", "rounding": "floor"}, 52),
    ({"convention": "per_token", "rounding": "round_half_even"}, 52),
    ({"convention": "per_token", "rounding": "ceil"}, 53),
    ({"rounding": "floor"}, 104),
    ({"rounding": "ceil"}, 105),
    ({"rounding": "ceil", "multiple_of": 4}, 108),
    ({"rounding": "floor", "multiple_of": 8}, 104),
    ({"min_capacity": 200}, 200),
    # More slots than tokens are never of use, multiple or not.
    ({"capacity_factor": 100.0}, 2000),
    ({"capacity_factor": 100.0, "multiple_of": 64}, 2000),
  ],
)
def test_capacity_conventions(changes, expected):
  assert round_capacity(**changes) == expected


@pytest.mark.parametrize(("tokens", "expected"), [(5, 2), (7, 4), (6, 3)])
def test_half_slots_round_to_even(tokens, expected):
  # 5/2 = 2.5 and 7/2 = 3.5 lie between integers; 6/2 does not.
  value = round_capacity(
    tokens_per_group=tokens,
    num_experts=2,
    top_k=1,
    capacity_factor=1.0,
    rounding="round_half_even",
  )
  assert value == expected


def test_capacity_factor_is_read_as_a_decimal():
  # In binary floats 1.1 * 100 / 10 is 11.000000000000002.
  assert round_capacity(tokens_per_group=100, num_experts=10, top_k=1, capacity_factor=1.1) == 11


def uniform_routing():
  """Return scores and selections of 4 tokens and 4 experts, perfectly balanced, K = 2."""
  scores = np.full((1, 4, 4), 0.25)
  selected = np.array([[[token, (token + 1) % 4] for token in range(4)]])
  return scores, selected


@pytest.mark.parametrize("scope", ["group", "batch"])
@pytest.mark.parametrize(
  ("kind", "expected"), [("switch", 1.0), ("gshard", 1.0), ("all_choices", 2.0)]
)
def test_uniform_routing_gives_the_known_minimum(kind, expected, scope):
  scores, selected = uniform_routing()
  assert losses.load_balance_loss(scores, selected, kind=kind, scope=scope) == pytest.approx(
    expected
  )


@pytest.mark.parametrize("padding", ["exclude", "flaxformer"])
def test_groups_that_cancel_are_balanced_only_in_the_batch(padding):
  # Group 0 sends all to expert 0, group 1 all to expert 1.
  scores = np.array([[[1.0, 0.0]] * 3, [[0.0, 1.0]] * 3])
  selected = np.array([[[0]] * 3, [[1]] * 3])
  options = {"kind": "gshard", "padding": padding}
  assert losses.load_balance_loss(scores, selected, scope="group", **options) == pytest.approx(2.0)
  assert losses.load_balance_loss(scores, selected, scope="batch", **options) == pytest.approx(1.0)


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_an_all_padding_group_changes_no_loss(scope):
  generator = np.random.default_rng(0)
  logits = generator.normal(size=(2, 5, 3))
  scores = np.array([[routing.softmax(row) for row in group] for group in logits])
  selected = np.array([[routing.top_experts(row, 2) for row in group] for group in scores])
  token_mask = np.array([[True] * 5, [False] * 5])
  value = losses.load_balance_loss(
    scores, selected, kind="all_choices", scope=scope, token_mask=token_mask
  )
  alone = losses.load_balance_loss(scores[:1], selected[:1], kind="all_choices", scope=scope)
  assert value == pytest.approx(alone, rel=1e-12)
  assert losses.router_z_loss(logits, token_mask=token_mask) == pytest.approx(
    losses.router_z_loss(logits[:1]), rel=1e-12
  )


def test_no_real_token_gives_zero_losses_and_drops():
  logits = np.zeros((1, 3, 4))
  token_mask = np.zeros((1, 3), bool)
  groups = routing.route(logits, top_k=1, capacity=2, token_mask=token_mask)
  scores, selected = groups[0].scores[None], np.zeros((1, 3, 1), int)
  assert losses.load_balance_loss(scores, selected, kind="switch", token_mask=token_mask) == 0.0
  assert losses.router_z_loss(logits, token_mask=token_mask) == 0.0
  counts = metrics.load(metrics.all_assignments(groups), 4)
  assert metrics.load_entropy(counts) == 0.0
  assert metrics.max_violation(counts) == 0.0
  assert metrics.dropped_tokens(groups, token_mask) == 0.0
  assert metrics.router_confidence(groups, token_mask) == 0.0


def test_z_loss_of_zero_logits_is_the_squared_log_of_experts():
  assert losses.router_z_loss(np.zeros((2, 3, 8))) == pytest.approx(math.log(8) ** 2)


@pytest.mark.parametrize(
  ("num_assignments", "num_experts", "expected"),
  [(2048, 8, 0.089), (2048, 16, 0.160), (2048, 64, 0.441), (65536, 64, 0.074)],
)
def test_sampling_floor_of_max_violation(num_assignments, num_experts, expected):
  # 2,000 draws leave a standard error of about 1 %; the references have three decimals.
  floor = metrics.max_violation_floor(num_assignments, num_experts)
  assert floor == pytest.approx(expected, rel=0.03, abs=5e-4)
  # The normal approximation is low by the skew of the counts: 6 % at 32 per expert, less above.
  assert metrics.max_violation_floor_normal(num_assignments, num_experts) == pytest.approx(
    floor, rel=0.1
  )


@pytest.mark.parametrize(
  ("counts", "entropy", "violation"), [((3, 3, 3), 1.0, 0.0), ((9, 0, 0), 0.0, 2.0)]
)
def test_extreme_loads(counts, entropy, violation):
  assert metrics.load_entropy(counts) == pytest.approx(entropy)
  assert metrics.max_violation(counts) == pytest.approx(violation)
