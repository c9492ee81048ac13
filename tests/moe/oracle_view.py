"""A routing config in the words of the oracles, and all that they say about one call of `route`."""

import dataclasses

import numpy as np
from comparison import relative_error
from oracles import capacity, losses, metrics, routing

from moe_jax.moe import (
  BalanceFraction,
  CapacityConvention,
  Grouping,
  Overflow,
  RoutingConfig,
  RoutingPlan,
  Selection,
)

# Sums of a few dozen float32 numbers, against float64.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Expected:
  """What the oracles make of one call; arrays as in the plan's methods of the same name."""

  dispatch: np.ndarray
  combine: np.ndarray
  losses: dict
  metrics: dict


def split_groups(a, config: RoutingConfig):
  """Cuts (B, L, ...) into (G, S, ...) with a loop: the judge of `to_groups`."""
  if config.grouping == Grouping.SEQUENCE:
    return a
  flat = a.reshape((-1, *a.shape[2:]))
  size = config.group_size or len(flat)
  groups = [flat[start : start + size] for start in range(0, len(flat), size)]
  filler = np.zeros_like(flat[:1])
  return np.stack([np.concatenate([g] + [filler] * (size - len(g))) for g in groups])


def capacity_of(config: RoutingConfig, num_tokens: int, train: bool) -> int:
  """Returns C."""
  if config.overflow == Overflow.DROPLESS:
    return num_tokens
  if config.capacity is not None:
    return min(config.capacity, num_tokens)
  return capacity.capacity(
    tokens_per_group=num_tokens,
    num_experts=config.num_experts,
    top_k=config.top_k,
    capacity_factor=config.capacity_factor if train else config.eval_capacity_factor,
    convention=str(config.capacity_convention),
    rounding=str(config.capacity_rounding),
    min_capacity=config.min_capacity,
    multiple_of=config.capacity_multiple,
  )


def options_of(config: RoutingConfig, num_tokens: int, *, train: bool) -> dict:
  """Returns the keyword arguments of `routing.route_group`, apart from mask and draws."""
  random = config.selection == Selection.RANDOM_SECOND and train
  return {
    "top_k": config.top_k,
    "capacity": capacity_of(config, num_tokens, train),
    "weighting": str(config.weighting),
    "drop_order": str(config.drop_order),
    "priority": str(config.priority),
    "second_expert": "random" if random else "always",
  }


def expect(logits, config: RoutingConfig, *, mask=None, draws=None, train=False) -> Expected:
  """Returns the oracles' answer for logits (G, S, E) and a mask (G, S)."""
  num_groups, num_tokens, _ = logits.shape
  mask = np.ones((num_groups, num_tokens), bool) if mask is None else mask
  options = options_of(config, num_tokens, train=train)
  groups = routing.route(logits, token_mask=mask, second_expert_draws=draws, **options)
  return Expected(
    dispatch=np.stack([group.dispatch for group in groups]),
    combine=np.stack([group.combine for group in groups]),
    losses=expected_losses(logits, groups, config, mask),
    metrics=expected_metrics(groups, config, mask, options["capacity"]),
  )


def expected_losses(logits, groups, config: RoutingConfig, mask) -> dict:
  """Returns both losses by the names of the plan."""
  first = config.balance_fraction == BalanceFraction.FIRST_CHOICE
  scores = np.stack([group.scores for group in groups])
  selected = [[routing.top_experts(row, config.top_k) for row in group] for group in scores]
  padding = str(config.loss_padding)
  balance = losses.load_balance_loss(
    scores,
    selected,
    kind="gshard" if first else "all_choices",
    scope=str(config.balance_scope),
    padding=padding,
    token_mask=mask,
  )
  if config.balance_fraction == BalanceFraction.ALL_CHOICES_MEAN:
    balance /= config.top_k
  z = losses.router_z_loss(logits, padding=padding, token_mask=mask)
  return {"load_balance": balance, "router_z": z}


def expected_metrics(groups, config: RoutingConfig, mask, slots: int) -> dict:
  """Returns every metric that is not a Monte Carlo estimate."""
  num_groups, num_tokens = np.shape(mask)
  experts = config.num_experts
  assignments = metrics.all_assignments(groups)
  counts = metrics.load(assignments, experts)
  per_token = config.capacity_convention == CapacityConvention.PER_TOKEN
  return {
    "load": counts / max(counts.sum(), 1),
    "assignments": counts.sum(),
    "load_entropy": metrics.load_entropy(counts) if counts.any() or experts == 1 else 0.0,
    "max_violation": metrics.max_violation(counts),
    "dropped_fraction": metrics.dropped_assignments(assignments),
    "dropped_token_fraction": metrics.dropped_tokens(groups, mask),
    "dead_experts": metrics.dead_experts(counts),
    "router_confidence": metrics.router_confidence(groups, mask),
    "capacity_utilization": metrics.capacity_utilisation(groups),
    "slots_per_assignment": metrics.slots_per_assignment(
      num_groups=num_groups,
      num_experts=experts,
      capacity=slots,
      top_k=config.top_k,
      num_real_tokens=int(np.sum(mask)),
    ),
    "effective_capacity_factor": slots
    * experts
    / (num_tokens * (1 if per_token else config.top_k)),
  }


def assert_plan_matches(plan: RoutingPlan, expected: Expected) -> None:
  """Compares dispatch exactly, and weights, losses and metrics to TOLERANCE."""
  np.testing.assert_array_equal(plan.dispatch_mask(), expected.dispatch)
  assert relative_error(plan.combine_weights(), expected.combine) <= TOLERANCE
  assert plan.losses.keys() == expected.losses.keys()
  for name, value in expected.losses.items():
    assert relative_error(plan.losses[name], value) <= TOLERANCE, name
  assert plan.metrics.keys() - expected.metrics.keys() == {"max_violation_floor"}
  for name, value in expected.metrics.items():
    # Most are fractions: one that should be 0 may be off by a rounding of 1.
    error = np.max(np.abs(np.asarray(plan.metrics[name], np.float64) - value))
    assert error <= TOLERANCE * max(1.0, np.max(np.abs(value))), name
