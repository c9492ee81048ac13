"""Capacity (how many slots an expert has) and the place stage (who gets them)."""

import fractions
import math

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.moe.types import (
  CapacityConvention,
  DropOrder,
  Overflow,
  Priority,
  Rounding,
  RoutingConfig,
)

_ROUND = {Rounding.CEIL: math.ceil, Rounding.FLOOR: math.floor, Rounding.ROUND_HALF_EVEN: round}


def expert_capacity(config: RoutingConfig, num_tokens: int, *, train: bool) -> int:
  """Returns C, the slots of one expert in a group of `num_tokens` = S tokens.

  `per_token`: CF * S / E (Switch, arXiv 2101.03961 Eq. 3); `per_assignment`: CF * K * S / E
  (GShard, arXiv 2006.16668 section 2.2, where CF = 1 and K = 2 give 2S/E). CF is read as the
  decimal it was written as: 1.1 * 100 / 10 is 11 slots, not ceil(11.000000000000002). Padding
  tokens count in S, so that C is static. Dropless routing has C = S: a token asks for an expert at
  most once.

  Raises:
    UserError: dropless routing with a given capacity below S, which would have to drop.
  """
  if config.overflow == Overflow.DROPLESS:
    if config.capacity is not None and config.capacity < num_tokens:
      raise UserError(
        f"capacity = {config.capacity} contradicts overflow = dropless for groups of {num_tokens}"
        f" tokens: set overflow = drop to use it, or capacity = None"
      )
    return num_tokens
  if config.capacity is not None:
    return min(config.capacity, num_tokens)
  factor = config.capacity_factor if train else config.eval_capacity_factor
  asked = num_tokens
  if config.capacity_convention == CapacityConvention.PER_ASSIGNMENT:
    asked *= config.top_k
  exact = fractions.Fraction(str(factor)) * asked / config.num_experts
  slots = max(_ROUND[config.capacity_rounding](exact), config.min_capacity)
  slots = -(-slots // config.capacity_multiple) * config.capacity_multiple
  return min(slots, num_tokens)


def place(
  expert_GSK: jax.Array,
  chosen_GSK: jax.Array,
  max_score_GS: jax.Array,
  config: RoutingConfig,
) -> jax.Array:
  """Queues the assignments at their experts and returns each one's place in the queue.

  Args:
    expert_GSK: (G, S, K) int32, the experts asked for, best first.
    chosen_GSK: (G, S, K) bool, False for assignments that do not ask (padding, an unused second
      choice); they take no place.
    max_score_GS: (G, S) float32, the order of `priority = max_score`; ties by position.
    config: `drop_order` and `priority` are read.

  Returns:
    (G, S, K) int32 places from 0; the assignment has a slot if its place is below C. The place of
    an assignment that does not ask is meaningless.
  """
  if config.priority == Priority.MAX_SCORE:
    order_GS = jnp.argsort(-max_score_GS, axis=1, stable=True)
    inverse_GS = jnp.argsort(order_GS, axis=1, stable=True)
    place_GSK = _queue(_take(expert_GSK, order_GS), _take(chosen_GSK, order_GS), config)
    return _take(place_GSK, inverse_GS)
  return _queue(expert_GSK, chosen_GSK, config)


def _take(a_GSK: jax.Array, index_GS: jax.Array) -> jax.Array:
  return jnp.take_along_axis(a_GSK, index_GS[..., None], axis=1)


def _queue(expert_GSK: jax.Array, chosen_GSK: jax.Array, config: RoutingConfig) -> jax.Array:
  """Counts, for each assignment, the earlier ones that ask for the same expert."""
  G, S, K = expert_GSK.shape
  choice_major = config.drop_order == DropOrder.CHOICE_MAJOR
  if choice_major:
    expert_GSK, chosen_GSK = expert_GSK.swapaxes(1, 2), chosen_GSK.swapaxes(1, 2)
  expert_GN, chosen_GN = expert_GSK.reshape(G, S * K), chosen_GSK.reshape(G, S * K)
  # Counts are int32: a bfloat16 running sum is wrong beyond 256.
  asks_GNE = jax.nn.one_hot(expert_GN, config.num_experts, dtype=jnp.int32) * chosen_GN[..., None]
  ahead_GNE = jnp.cumsum(asks_GNE, axis=1) - asks_GNE
  place_GN = jnp.take_along_axis(ahead_GNE, expert_GN[..., None], axis=2)[..., 0]
  if choice_major:
    return place_GN.reshape(G, K, S).swapaxes(1, 2)
  return place_GN.reshape(G, S, K)
