"""`route` equals the loops of the oracle, for every pair of options, on every kind of input."""

import itertools
import random

import jax
import numpy as np
import pytest
from comparison import ROUTING_MARGIN, draw_logits, softmax
from moe.compiled import compiled_route
from moe.oracle_view import assert_plan_matches, expect, split_groups
from moe.pairwise import pairwise_rows

from moe_jax.moe import RoutingConfig, preset, preset_names
from moe_jax.moe.groups import to_groups

B, L = 2, 6
KEY = jax.random.key(3)

# E and K; where they leave no choice (K = E), and where there is nothing to choose (E = 1).
SIZES = ((1, 1), (4, 1), (4, 3), (4, 4), (8, 1), (8, 2), (8, 8))
FACTORS = {
  "size": SIZES,
  "weighting": ("raw", "renormalized", "renormalized_after_drop", "softmax_selected"),
  "selection": ("top_k", "random_second"),
  "drop_order": ("choice_major", "token_major"),
  "priority": ("position", "max_score"),
  "capacity_convention": ("per_token", "per_assignment"),
  "capacity_rounding": ("ceil", "floor", "round_half_even"),
  "capacity_factor": (0.5, 0.75, 2.0),
  "overflow": ("drop", "dropless"),
  # 12 tokens in groups of 5: three groups, the last with three fillers.
  "grouping": ("batch", "sequence", "fixed"),
  "balance_fraction": ("first_choice", "all_choices", "all_choices_mean"),
  "balance_scope": ("group", "batch"),
  "loss_padding": ("exclude", "flaxformer"),
}


def allowed(row):
  return row["selection"] == "top_k" or row["size"][1] == 2


def config_of(row):
  fields = dict(row)
  num_experts, top_k = fields.pop("size")
  group_size = 5 if fields["grouping"] == "fixed" else None
  return RoutingConfig(num_experts=num_experts, top_k=top_k, group_size=group_size, **fields)


def show(config):
  choices = (config.weighting, config.selection, config.drop_order, config.priority)
  words = (*choices, config.overflow, config.grouping)
  return f"E{config.num_experts}K{config.top_k}-" + "-".join(words)


ROWS = [config_of(row) for row in pairwise_rows(FACTORS, allowed)]
# What decides which assignment gets which slot and weight; the rest is drawn for each row.
INTERACTING = ("size", "weighting", "selection", "drop_order", "priority", "overflow", "grouping")


def product_rows():
  """Returns every allowed combination of the interacting factors."""
  rows = []
  for i, values in enumerate(itertools.product(*(FACTORS[name] for name in INTERACTING))):
    drawn = {name: random.Random(i).choice(values) for name, values in FACTORS.items()}
    rows.append({**drawn, **dict(zip(INTERACTING, values, strict=True))})
  return [config_of(row) for row in rows if allowed(row)]


def masks():
  """Returns masks (B, L) by name."""
  real = np.ones((B, L), bool)
  right, left, sequence = real.copy(), real.copy(), real.copy()
  right[0, 4:], right[1, 2:] = False, False
  left[0, :1], left[1, :3] = False, False
  sequence[1] = False
  return {"none": real, "right": right, "left": left, "sequence": sequence, "all": ~real}


def inputs(num_experts):
  """Returns logits (B, L, E) by name: plain ones, ties, and experts that nobody wants."""
  plain = draw_logits(7, (B, L, num_experts))
  tied_experts = plain.copy()
  tied_experts[..., 1::2] = tied_experts[..., : 2 * (num_experts // 2) : 2]
  tied_tokens = plain.copy()
  tied_tokens[:, 1::2] = tied_tokens[:, ::2]
  empty = plain.copy()
  empty[..., 1:3] = -1e9
  equal = np.full_like(plain, 0.3)
  return {
    "plain": plain,
    "equal": equal,
    "tied_experts": tied_experts,
    "tied_tokens": tied_tokens,
    "empty": empty,
  }


def draws_of(logits):
  """Returns the uniform numbers of `selection`, none of which stands on a decision."""
  draws = np.array(jax.random.uniform(KEY, logits.shape[:2]))
  if logits.shape[-1] > 1:
    second, first = np.moveaxis(np.sort(softmax(logits), axis=-1)[..., -2:], -1, 0)
    assert np.min(np.abs(2.0 * second / (first + second) - draws)) > ROUTING_MARGIN
  return draws


def assert_equals_oracle(config, logits, mask, train):
  grouped_logits, grouped_mask = split_groups(logits, config), split_groups(mask, config)
  np.testing.assert_array_equal(to_groups(logits, config), grouped_logits)
  np.testing.assert_array_equal(to_groups(mask, config), grouped_mask)
  draws = draws_of(grouped_logits)
  expected = expect(grouped_logits, config, mask=grouped_mask, draws=draws, train=train)
  plan = compiled_route(config, train)(grouped_logits, grouped_mask, KEY)
  assert_plan_matches(plan, expected)


def trains(config):
  """With one choice a renormalised weight is constant, and training refuses it."""
  return config.top_k > 1 or config.weighting == "raw"


@pytest.mark.parametrize("config", ROWS, ids=show)
def test_route_equals_the_oracle(config):
  assert_equals_oracle_on_every_kind_of_input(config)


@pytest.mark.full
@pytest.mark.parametrize("config", product_rows(), ids=show)
def test_route_equals_the_oracle_in_the_whole_product(config):
  assert_equals_oracle_on_every_kind_of_input(config)


def assert_equals_oracle_on_every_kind_of_input(config):
  kinds = inputs(config.num_experts)
  cases = [("plain", mask) for mask in masks()] + [(kind, "right") for kind in kinds]
  for kind, mask in dict.fromkeys(cases):
    assert_equals_oracle(config, kinds[kind], masks()[mask], trains(config))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", preset_names())
def test_presets_equal_the_oracle(name, train):
  config = preset(name, num_experts=8)
  for mask in masks().values():
    assert_equals_oracle(config, inputs(8)["plain"], mask, train)
