"""A routing config in the words of the oracles, and all that they say about one call of `route`."""

import dataclasses

import numpy as np
from comparison import ROUTING_MARGIN, relative_error
from moe.compiled import tensors
from moe.oracle_draws import draws_of
from oracles import capacity, decisions, losses, metrics, routing, scores

from moe_jax.moe import (
  BalanceFraction,
  BalanceScope,
  BalanceSource,
  CapacityConvention,
  Grouping,
  Importance,
  LoadThreshold,
  NullExpert,
  Overflow,
  RoutingConfig,
  RoutingPlan,
)

# Sums of a few dozen float32 numbers, against float64.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Expected:
  """What the oracles make of one call.

  Attributes:
    expert, slot, valid: (G, S, K), those of the plan before its last two axes became one.
    dispatch, combine: as in the plan's methods.
    identity: (G, S) or None.
    losses, metrics: by name.
    margin: the size of the narrowest decision.
  """

  expert: np.ndarray
  slot: np.ndarray
  valid: np.ndarray
  dispatch: np.ndarray
  combine: np.ndarray
  identity: np.ndarray | None
  losses: dict
  metrics: dict
  margin: float


def split_groups(a, config: RoutingConfig):
  """Cuts (B, L, ...) into (G, S, ...) with a loop: the judge of `to_groups`."""
  if config.grouping == Grouping.SEQUENCE:
    return a
  flat = a.reshape((-1, *a.shape[2:]))
  size = min(config.group_size or len(flat), len(flat))
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
  """Returns the fields of `oracles.options.Options`."""
  same = (
    "top_k num_null_experts score granularity selection second_threshold num_expert_groups"
    " top_expert_groups group_score hash_seed hash_ngram weighting weight_scale drop_order priority"
  )
  fields = {name: getattr(config, name) for name in same.split()}
  reroutes = config.overflow == Overflow.REROUTE
  return {
    **{name: str(value) if isinstance(value, str) else value for name, value in fields.items()},
    "norm_order": config.weight_norm_order,
    "capacity": capacity_of(config, num_tokens, train),
    "reroute_attempts": config.reroute_attempts if reroutes else 0,
    "train": train,
  }


def expect(
  logits,
  config: RoutingConfig,
  *,
  mask=None,
  key=None,
  train=False,
  token_ids=None,
  segment_ids=None,
  noise_scale=None,
  bias=None,
  global_load=None,
) -> Expected:
  """Returns the oracles' answer for logits (G, S, E') and what else `route` takes."""
  num_groups, num_tokens, _ = logits.shape
  mask = np.ones((num_groups, num_tokens), bool) if mask is None else mask
  draws = draws_of(config, key, logits.shape, train=train, noise_scale=noise_scale)
  options = options_of(config, num_tokens, train=train)
  with decisions.watched() as gaps:
    groups = routing.route(
      logits,
      token_mask=mask,
      token_ids=token_ids,
      segment_ids=segment_ids,
      noise=draws.noise,
      bias=bias,
      select_draws=draws.select,
      place_draws=draws.place,
      **options,
    )
    values = expected_losses(logits, groups, config, mask, draws, segment_ids, global_load)
  return Expected(
    *columns_of(groups),
    dispatch=np.stack([group.dispatch for group in groups]),
    combine=np.stack([group.combine for group in groups]),
    identity=identity_of(groups, config),
    losses=values,
    metrics=expected_metrics(groups, config, mask, options["capacity"]),
    margin=min(gaps, default=np.inf),
  )


def columns_of(groups):
  """Returns expert, slot and valid (G, S, K); -1 for the experts of padding."""
  width = max((len(row) for group in groups for row in group.chosen), default=0)
  shape = (len(groups), len(groups[0].chosen), width)
  expert, slot = np.full(shape, -1), np.full(shape, -1)
  for index, group in enumerate(groups):
    for token, row in enumerate(group.chosen):
      expert[index, token, : len(row)] = row
    for one in group.assignments:
      slot[index, one.token, one.choice] = one.slot
  return expert, slot, slot >= 0


def identity_of(groups, config: RoutingConfig):
  """Returns the weights (G, S) of tokens in their own outputs, or None."""
  if not config.num_null_experts or config.null_expert == NullExpert.ZERO:
    return None
  return np.stack([group.null_weight for group in groups])


def expected_losses(
  logits, groups, config: RoutingConfig, mask, draws=None, segment_ids=None, global_load=None
) -> dict:
  """Returns the losses by the names of the plan."""
  padding, width = str(config.loss_padding), config.num_experts
  loads = (None, None) if global_load is None else (global_load[:width], global_load[width:])
  balance = losses.load_balance_loss(
    np.stack([group.probabilities for group in groups]),
    counted_of(groups, config),
    kind="all_choices",
    scope=str(config.balance_scope),
    padding=padding,
    token_mask=mask,
    segment_ids=segment_ids,
    global_load=loads[0],
  )
  if config.balance_fraction == BalanceFraction.ALL_CHOICES_MEAN:
    given = config.balance_scope == BalanceScope.GLOBAL_BATCH and global_load is not None
    balance /= 1 if given else config.top_k
  clean = clean_logits(logits, mask, segment_ids, config)
  per_group = config.balance_scope == BalanceScope.GROUP
  values = {
    "load_balance": balance,
    "router_z": losses.router_z_loss(clean, padding=padding, token_mask=mask),
    "importance": losses.importance_loss(
      importance_of(clean, groups, config, mask)[..., :width],
      per_group=per_group,
      padding=padding,
      token_mask=mask,
    ),
  }
  if config.load_loss_weight and draws is not None and draws.std is not None:
    values["load"] = losses.load_loss(
      clean,
      draws.noise,
      draws.std,
      top_k=config.top_k,
      exclude_self=config.load_threshold == LoadThreshold.EXCLUDE_SELF,
      per_group=per_group,
      padding=padding,
      token_mask=mask,
    )
  pooling = dict(
    scope=str(config.balance_scope), padding=padding, token_mask=mask, segment_ids=segment_ids
  )
  return values | losses_over_devices(groups, config, loads, pooling)


def losses_over_devices(groups, config: RoutingConfig, loads, pooling) -> dict:
  """Returns the losses over devices that count, by the names of the plan."""
  probs, D = np.stack([group.probabilities for group in groups]), config.num_expert_groups
  given = config.balance_scope == BalanceScope.GLOBAL_BATCH and loads[0] is not None
  of_experts, of_devices = loads if given else (None, None)
  values = {}
  if config.device_loss_weight:
    counted = counted_of(groups, config)
    value = losses.device_balance_loss(
      probs, counted, num_devices=D, global_load=of_experts, **pooling
    )
    mean = config.balance_fraction == BalanceFraction.ALL_CHOICES_MEAN and not given
    values["device_balance"] = value / (config.top_k if mean else 1)
  if config.communication_loss_weight:
    every = dataclasses.replace(config, balance_fraction="all_choices")
    values["communication"] = losses.communication_loss(
      probs,
      counted_of(groups, every),
      num_devices=D,
      max_devices=config.top_expert_groups,
      global_load=of_devices,
      **pooling,
    )
  return values


def clean_logits(logits, mask, segment_ids, config: RoutingConfig):
  """Returns the logits that are routed, without noise."""
  segments = segment_ids if segment_ids is not None else [None] * len(logits)
  options = routing.Options(**options_of(config, logits.shape[1], train=False))
  return np.stack(
    [routing.routed_logits(*row, None, options) for row in zip(logits, mask, segments, strict=True)]
  )


def counted_of(groups, config: RoutingConfig):
  """Returns for each group and token the experts that f counts."""
  first = config.balance_fraction == BalanceFraction.FIRST_CHOICE
  dispatched = config.balance_source == BalanceSource.DISPATCH
  counted = [[[] for _ in group.chosen] for group in groups]
  for row, group in zip(counted, groups, strict=True):
    for one in group.assignments:
      if (one.choice == 0 or not first) and (one.slot >= 0 or not dispatched):
        row[one.token].append(one.expert if dispatched else one.wish)
  return counted


def importance_of(clean, groups, config: RoutingConfig, mask):
  """Returns (G, S, E or more), what the importance loss sums."""
  if config.importance == Importance.SCORES:
    options = groups[0].options
    rows = [[scores.score(row, options) for row in group] for group in clean]
    return np.array(rows) * mask[..., None]
  weights = np.zeros((*mask.shape, config.num_experts))
  for index, group in enumerate(groups):
    for one in group.assignments:
      weights[index, one.token, one.wish] = one.wish_weight
  return weights


def expected_metrics(groups, config: RoutingConfig, mask, slots: int) -> dict:
  """Returns every metric that is not a Monte Carlo estimate."""
  num_groups, num_tokens = np.shape(mask)
  experts, real = config.num_experts, int(np.sum(mask))
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
    "unrouted_fraction": metrics.unrouted_tokens(groups, mask),
    "experts_per_token": metrics.experts_per_token(groups, real),
    "dead_experts": metrics.dead_experts(counts),
    "router_confidence": metrics.router_confidence(groups, mask),
    "capacity_utilization": metrics.capacity_utilisation(groups),
    "slots_per_assignment": metrics.slots_per_assignment(
      num_groups=num_groups,
      num_experts=experts,
      capacity=slots,
      top_k=config.top_k,
      num_real_tokens=real,
    ),
    "effective_capacity_factor": slots
    * experts
    / (num_tokens * (1 if per_token else config.top_k)),
  }


def assert_plan_matches(plan: RoutingPlan, expected: Expected) -> None:
  """Compares decisions exactly, and weights, losses and metrics to TOLERANCE."""
  assert expected.margin > ROUTING_MARGIN, "the input stands on the edge of a decision"
  assert_same_columns(plan, expected)
  dispatch, combine = tensors(plan)
  np.testing.assert_array_equal(dispatch, expected.dispatch)
  assert relative_error(combine, expected.combine) <= TOLERANCE
  assert (plan.identity is None) == (expected.identity is None)
  if plan.identity is not None:
    assert relative_error(plan.identity, expected.identity) <= TOLERANCE
  assert plan.losses.keys() == expected.losses.keys()
  for name, value in expected.losses.items():
    assert relative_error(plan.losses[name], value) <= TOLERANCE, name
  # The floor is a Monte Carlo estimate; the load that balancing reads is judged over a whole step.
  unjudged = {"max_violation_floor", "balance_load"}
  assert plan.metrics.keys() - expected.metrics.keys() <= unjudged
  for name, value in expected.metrics.items():
    # Most are fractions: one that should be 0 may be off by a rounding of 1.
    error = np.max(np.abs(np.asarray(plan.metrics[name], np.float64) - value))
    assert error <= TOLERANCE * max(1.0, np.max(np.abs(value))), name


def assert_same_columns(plan: RoutingPlan, expected: Expected) -> None:
  """Compares the ids of experts, the slots and the drops of every token, exactly."""
  if not expected.expert.size:
    assert not np.any(plan.valid)
    return
  shape = expected.expert.shape
  expert, slot, valid, token = (
    np.asarray(a).reshape(shape) for a in (plan.expert, plan.slot, plan.valid, plan.token)
  )
  real = expected.expert >= 0
  np.testing.assert_array_equal(expert[real], expected.expert[real])
  np.testing.assert_array_equal(valid, expected.valid)
  np.testing.assert_array_equal(slot[valid], expected.slot[valid])
  np.testing.assert_array_equal(token, np.broadcast_to(np.arange(shape[1])[:, None], shape))
