"""Routers of every kind, and inputs for them that stand on no decision's edge."""

import itertools
import random

import numpy as np
from comparison import ROUTING_MARGIN
from moe.oracle_view import expect, split_groups
from moe.pairwise import pairwise_rows

from moe_jax.errors import UserError
from moe_jax.moe import RoutingConfig

B, L = 2, 6

# E and K: nothing to choose (E = 1), one choice, all experts, an E that nothing divides.
SIZES = ((1, 1), (5, 1), (5, 5), (6, 2), (6, 4), (7, 3))
# The losses over devices, which are groups of experts.
OVER_DEVICES = {"device_loss_weight": 0.05, "communication_loss_weight": 0.02}
# Limits of what a token may ask, as fields of the config.
LIMITS = {
  "none": {},
  "groups_max": {"num_expert_groups": 3, "top_expert_groups": 2, **OVER_DEVICES},
  "groups_top2": {"num_expert_groups": 3, "top_expert_groups": 2, "group_score": "top2_sum"},
  "null_zero": {"num_null_experts": 2},
  "null_identity": {"num_null_experts": 1, "null_expert": "identity"},
}
FACTORS = {
  "size": SIZES,
  "score": ("softmax", "sigmoid", "sqrt_softplus", "relu"),
  "noise": ("none", "gaussian", "learned", "gumbel"),
  "granularity": ("token", "segment"),
  "selection": (
    "top_k",
    "random_second",
    "threshold_second",
    "sample",
    "random",
    "hash",
    "table",
    "positive",
    "hierarchical",
  ),
  "limits": tuple(LIMITS),
  "bias_update": ("none", "sign"),
  "weighting": (
    "raw",
    "renormalized",
    "renormalized_after_drop",
    "softmax_selected",
    "hard",
    "straight_through",
  ),
  "weight_norm_order": (1.0, 2.0),
  "weight_scale": (1.0, 2.5),
  "drop_order": ("choice_major", "token_major"),
  "priority": ("position", "max_score", "sum_score", "probability", "weight", "random"),
  "overflow": ("drop", "reroute", "dropless"),
  "reroute_attempts": (1, 3),
  "capacity_convention": ("per_token", "per_assignment"),
  "capacity_rounding": ("ceil", "floor", "round_half_even"),
  "capacity_factor": (0.5, 0.75, 2.0),
  # 12 tokens in groups of 5: three groups, the last with three fillers.
  "grouping": ("batch", "sequence", "fixed"),
  "balance_fraction": ("first_choice", "all_choices", "all_choices_mean"),
  "balance_source": ("selection", "dispatch"),
  "balance_scope": ("group", "sequence", "batch", "global_batch"),
  "importance": ("weights", "scores"),
  "load_threshold": ("exclude_self", "include_self"),
  "loss_padding": ("exclude", "flaxformer"),
}
# What decides which assignment gets which slot and weight; the rest is drawn for each row.
INTERACTING = ("size", "selection", "limits", "weighting", "drop_order", "priority", "overflow")


def config_of(row) -> RoutingConfig:
  """Returns the config of a row of FACTORS."""
  fields = dict(row)
  num_experts, top_k = fields.pop("size")
  limits = LIMITS[fields.pop("limits")]
  if fields["selection"] == "hierarchical":
    limits = limits or LIMITS["groups_max"]
  plain = fields["selection"] == "top_k" and limits == {} and fields["bias_update"] == "none"
  noisy = fields["noise"] in ("gaussian", "learned")
  return RoutingConfig(
    num_experts=num_experts,
    top_k=top_k,
    group_size=5 if fields["grouping"] == "fixed" else None,
    eval_capacity_factor=fields["capacity_factor"],
    hash_ngram=2,
    second_threshold=0.4,
    load_loss_weight=0.1 if plain and noisy else 0.0,
    **limits,
    **fields,
  )


def allowed(row) -> bool:
  """Tells whether a row is a router whose decisions are more than roundings."""
  try:
    config = config_of(row)
  except UserError:
    return False
  # Softmax scores of all experts sum to 1 for every token, up to rounding.
  full = config.top_k == config.num_experts > 1 or config.selection == "positive"
  if config.priority == "sum_score" and config.score == "softmax" and full:
    return False
  # A norm over one choice gives 1, up to rounding.
  if config.priority == "weight" and config.weight_norm_order != 1.0:
    return False
  # Tokens of a segment share their scores; experts that do not follow from these come in any order,
  # and so do the terms of the sum that a weight is divided by.
  if config.priority == "weight" and config.granularity == "segment" and unordered(config):
    return False
  # sqrt(softplus) is positive, however small; no float shows it.
  return config.selection != "positive" or config.score != "sqrt_softplus"


def unordered(config: RoutingConfig) -> bool:
  """Tells whether tokens with the same scores may ask for the same experts in another order."""
  return config.selector.draws or not config.selector.learned


def show(config: RoutingConfig) -> str:
  """Returns a test's name."""
  words = (config.selection, config.score, config.weighting, config.priority, config.overflow)
  return f"E{config.num_experts}K{config.top_k}-" + "-".join(words)


def pairwise_configs() -> list[RoutingConfig]:
  """Returns routers in which every allowed pair of choices meets."""
  return [config_of(row) for row in pairwise_rows(FACTORS, allowed)]


def product_configs(selection: str, weighting: str):
  """Yields every allowed combination of the interacting factors; the others are drawn.

  The drawn ones change scores, noise, the number of slots or the losses; given these, the plan does
  not depend on them. They still meet everything in pairs, and here by chance.
  """
  fixed = FACTORS | {"selection": (selection,), "weighting": (weighting,)}
  plainest = {name: choices[0] for name, choices in FACTORS.items()}
  for seed, values in enumerate(itertools.product(*(fixed[name] for name in INTERACTING))):
    interacting = dict(zip(INTERACTING, values, strict=True))
    # No drawn factor but the score decides whether a combination can be allowed at all.
    if any(allowed(plainest | interacting | {"score": score}) for score in FACTORS["score"]):
      yield config_of(_draw_allowed(interacting, random.Random(seed)))


def _draw_allowed(interacting, generator):
  """Returns the first random row with the given values that is allowed."""
  while True:
    row = {name: generator.choice(choices) for name, choices in FACTORS.items()} | interacting
    if allowed(row):
      return row


def trains(config: RoutingConfig) -> bool:
  """Tells whether training accepts the router; some weights are constant."""
  try:
    config.check_trainable()
  except UserError:
    return False
  return True


def masks():
  """Returns masks (B, L) by name."""
  real = np.ones((B, L), bool)
  right, left, sequence, one = real.copy(), real.copy(), real.copy(), ~real
  right[0, 4:], right[1, 2:] = False, False
  left[0, :1], left[1, :3] = False, False
  sequence[1] = False
  one[1, 2] = True
  return {
    "none": real,
    "right": right,
    "left": left,
    "sequence": sequence,
    "one_token": one,
    "all": ~real,
  }


PLAIN_CASES = tuple(("plain", name) for name in ("none", "left", "sequence", "one_token", "all"))
TIED_CASES = tuple((kind, "right") for kind in ("equal", "tied_experts", "tied_tokens", "empty"))


def cases_of(config: RoutingConfig):
  """Returns kinds of logits with kinds of masks; noise would break ties, and be lost at -1e9."""
  noisy = trains(config) and config.noise != "none"
  divided = config.weighting in ("renormalized", "renormalized_after_drop", "softmax_selected")
  # Equal scores give weights that tie but for the order in which their divisor adds them.
  rounded = config.priority == "weight" and divided and unordered(config)
  if noisy or rounded:
    return PLAIN_CASES
  # Scores of 1e-19 divided by sums that differ: weights in an order that no float32 code can see.
  unseen = config.priority == "weight" and divided and config.score == "sqrt_softplus"
  return PLAIN_CASES + tuple(case for case in TIED_CASES if not unseen or case[0] != "empty")


def logits_of(kind: str, shape, seed: int):
  """Returns float32 logits (B, L, E')."""
  logits = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  num_experts = shape[-1]
  if kind == "tied_experts":
    logits[..., 1::2] = logits[..., : 2 * (num_experts // 2) : 2]
  elif kind == "tied_tokens":
    logits[:, 1::2] = logits[:, ::2]
  elif kind == "empty":
    logits[..., 1:3] = -1e9
  elif kind == "equal":
    logits[...] = 0.3
  return logits


def more_of(config: RoutingConfig, shape, seed: int) -> dict:
  """Returns what `route` takes besides logits, mask and key, on (B, L, ...)."""
  generator = np.random.default_rng(seed + 1000)
  more = {
    "token_ids": generator.integers(0, 50, size=shape[:2]).astype(np.int32),
    "segment_ids": np.array([[1, 1, 1, 2, 2, 0], [5, 5, 6, 6, 6, 6]], np.int32)[:, : shape[1]],
  }
  if config.noise == "learned":
    more["noise_scale"] = generator.uniform(0.3, 1.2, size=shape).astype(np.float32)
  return more


def grouped_case(config: RoutingConfig, kind: str, mask, key, *, train: bool, length: int = L):
  """Returns logits, mask and the rest in groups, and what the oracle expects.

  The first of a few seeds whose narrowest decision is wider than ROUTING_MARGIN.
  """
  shape = (B, length, config.num_logits)
  for seed in range(2000):
    more = more_of(config, shape, seed)
    arrays = (logits_of(kind, shape, seed), mask, *more.values())
    logits, grouped_mask, *rest = (split_groups(a, config) for a in arrays)
    more = dict(zip(more, rest, strict=True))
    if config.bias_update != "none":
      more["bias"] = np.random.default_rng(seed).normal(size=shape[-1:]).astype(np.float32) / 3
    if config.balance_scope == "global_batch":
      more["global_load"] = np.random.default_rng(seed).random(
        config.num_load_fractions, np.float32
      )
    expected = expect(logits, config, mask=grouped_mask, key=key, train=train, **more)
    if expected.margin > ROUTING_MARGIN:
      return logits, grouped_mask, more, expected
  raise AssertionError(f"no input with margins found for {kind}")
