"""`route` equals the loops of the oracle, for every pair of options, on every kind of input."""

import dataclasses

import jax
import numpy as np
import pytest
from moe.compiled import compiled_route
from moe.oracle_view import assert_plan_matches, split_groups
from moe.router_cases import (
  FACTORS,
  B,
  L,
  cases_of,
  grouped_case,
  masks,
  pairwise_configs,
  show,
  trains,
)
from small_presets import small_preset

from moe_jax.moe import RoutingConfig, preset, preset_names
from moe_jax.moe.groups import to_groups

KEY = jax.random.key(3)


def assert_equals_oracle(config, kind, mask, train, length=L):
  logits, grouped_mask, more, expected = grouped_case(
    config, kind, mask, KEY, train=train, length=length
  )
  plan = compiled_route(config, train)(logits, grouped_mask, KEY, more)
  assert_plan_matches(plan, expected)


@pytest.mark.parametrize("config", pairwise_configs(), ids=show)
def test_route_equals_the_oracle(config):
  for kind, mask in cases_of(config):
    assert_equals_oracle(config, kind, masks()[mask], trains(config))


@pytest.mark.parametrize(
  "fields",
  [
    {"top_k": 1, "weighting": "renormalized"},
    {"top_k": 5, "weighting": "hard", "priority": "probability"},
  ],
  ids=["renormalized", "probability"],
)
def test_scores_too_small_for_float32_are_no_refusals(fields):
  # ln(1 + e^z) is positive for every z; tokens are sent here whatever the router says.
  config = RoutingConfig(num_experts=5, selection="hash", score="sqrt_softplus", **fields)
  assert_equals_oracle(config, "empty", masks()["right"], train=False)


TOKEN_CHOICE = [name for name in preset_names() if preset(name).selection in FACTORS["selection"]]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_presets_equal_the_oracle(name, train):
  # One slot an expert, so that most presets drop.
  config = small_preset(name, 8)
  if config.overflow != "dropless":
    config = dataclasses.replace(config, capacity=1)
  for mask in masks().values():
    assert_equals_oracle(config, "plain", mask, train)


@pytest.mark.parametrize("selection", FACTORS["selection"])
def test_a_group_of_one_token_equals_the_oracle(selection):
  two_levels = {"num_expert_groups": 3, "top_expert_groups": 2}
  limits = two_levels if selection == "hierarchical" else {}
  config = RoutingConfig(
    num_experts=6, top_k=2, selection=selection, grouping="sequence", weighting="raw", **limits
  )
  assert_equals_oracle(config, "plain", np.array([[True], [False]]), trains(config), length=1)


@pytest.mark.parametrize(
  "fields",
  [{}, {"grouping": "sequence"}] + [{"grouping": "fixed", "group_size": n} for n in (1, 5, 6, 50)],
)
def test_groups_are_cut_like_the_oracles(fields):
  config = RoutingConfig(num_experts=4, **fields)
  a = np.arange(B * L * 4.0).reshape(B, L, 4)
  np.testing.assert_array_equal(to_groups(a, config), split_groups(a, config))
