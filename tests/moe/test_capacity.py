"""Capacity equals the exact fractions of the oracle and the numbers of the literature."""

import itertools

import pytest
from moe.oracle_view import capacity_of

from moe_jax.errors import UserError
from moe_jax.moe import RoutingConfig, expert_capacity

# 1.1 and 1.2 have no exact binary float; 0.05 leaves less than one slot.
FACTORS = (0.05, 0.5, 1.0, 1.1, 1.2, 1.25, 2.0, 100.0)


def slots(num_tokens, train=True, **fields):
  return expert_capacity(RoutingConfig(**fields), num_tokens, train=train)


@pytest.mark.parametrize("rounding", ["ceil", "floor", "round_half_even"])
@pytest.mark.parametrize("convention", ["per_token", "per_assignment"])
def test_capacity_equals_the_oracle(convention, rounding):
  grid = itertools.product((1, 7, 100, 2000), (1, 3, 10, 48), (1, 2), FACTORS, (1, 4), (1, 8))
  for num_tokens, num_experts, top_k, factor, least, multiple in grid:
    config = RoutingConfig(
      num_experts=num_experts,
      top_k=min(top_k, num_experts),
      capacity_factor=factor,
      capacity_convention=convention,
      capacity_rounding=rounding,
      min_capacity=least,
      capacity_multiple=multiple,
    )
    assert expert_capacity(config, num_tokens, train=True) == capacity_of(config, num_tokens, True)


@pytest.mark.parametrize(
  ("convention", "rounding", "expected"),
  [
    # 1.25 * 2000 / 48 = 52.08 slots a token, twice that, 104.17, a pair of assignments.
    ("per_token", "floor", 52),
    ("per_token", "round_half_even", 52),
    ("per_token", "ceil", 53),
    ("per_assignment", "floor", 104),
    ("per_assignment", "ceil", 105),
  ],
)
def test_conventions_differ_as_in_the_literature(convention, rounding, expected):
  fields = {"capacity_convention": convention, "capacity_rounding": rounding}
  assert slots(2000, num_experts=48, top_k=2, capacity_factor=1.25, **fields) == expected


@pytest.mark.parametrize(("num_tokens", "expected"), [(5, 2), (7, 4), (6, 3)])
def test_half_a_slot_rounds_to_even(num_tokens, expected):
  fields = {"capacity_rounding": "round_half_even", "capacity_factor": 1.0}
  assert slots(num_tokens, num_experts=2, **fields) == expected


def test_the_factor_is_read_as_a_decimal():
  # In binary floats 1.1 * 100 / 10 is 11.000000000000002, whose ceiling is 12.
  assert slots(100, num_experts=10, capacity_factor=1.1) == 11


def test_training_and_evaluation_have_their_own_factor():
  fields = {"num_experts": 4, "capacity_factor": 1.0, "eval_capacity_factor": 2.0}
  assert slots(16, train=True, **fields) == 4
  assert slots(16, train=False, **fields) == 8


def test_a_given_capacity_overrides_both_factors_and_every_adjustment():
  fields = {"num_experts": 4, "capacity": 3, "min_capacity": 5, "capacity_multiple": 8}
  assert slots(16, train=True, **fields) == 3
  assert slots(16, train=False, **fields) == 3


@pytest.mark.parametrize(
  "fields",
  [
    {"capacity": 100},
    {"capacity_factor": 100.0},
    {"min_capacity": 100},
    {"capacity_multiple": 64},
    {"overflow": "dropless"},
  ],
)
def test_capacity_never_exceeds_the_tokens_of_a_group(fields):
  assert slots(6, num_experts=4, **fields) == 6


def test_a_capacity_that_would_drop_is_refused_when_dropless():
  with pytest.raises(UserError, match=r"capacity = 3 .*overflow = drop "):
    slots(6, num_experts=4, capacity=3, overflow="dropless")
  assert slots(3, num_experts=4, capacity=3, overflow="dropless") == 3
