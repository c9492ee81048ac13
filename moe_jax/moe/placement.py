"""Place stage: who gets a slot when an expert is full."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import DropOrder, Overflow, Priority
from moe_jax.sharding.local import row_top_k


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the assignments went.

  Attributes:
    expert: (G, S, K) int32, the expert asked for last: under `reroute` another than at first.
    slot: (G, S, K) int32, the place in that expert's queue, from 0.
    kept: (G, S, K) bool, the assignment asked and its place is below C.
  """

  expert: jax.Array
  slot: jax.Array
  kept: jax.Array


def place(
  expert_GSK: jax.Array,
  asked_GSK: jax.Array,
  ranking_GSE: jax.Array,
  score_GSK: jax.Array,
  best_score_GS: jax.Array,
  config: RoutingConfig,
  *,
  capacity: int,
  key: jax.Array | None,
) -> Placement:
  """Queues the assignments at their experts, and re-routes those that found no slot.

  Args:
    expert_GSK: (G, S, K) int32, the experts asked for, best first.
    asked_GSK: (G, S, K) bool, False for assignments that do not ask (padding, an unused second
      choice, a null expert); they take no place.
    ranking_GSE: (G, S, E) float32, the order in which re-routing goes on; -inf is never asked.
    score_GSK: (G, S, K) float32, the scores of the selected experts, under `priority = weight`
      their weights; under that and `probability` a re-routed assignment keeps its place in this
      order.
    best_score_GS: (G, S) float32, the order of `priority = max_score`. All ties go by position.
    config: `drop_order`, `priority`, `overflow` and `reroute_attempts` are read.
    capacity: C.
    key: for `priority = random`; None keeps the order of the sequence.
  """
  score_GSK = jax.lax.stop_gradient(score_GSK)
  order = _Order(config, score_GSK, jax.lax.stop_gradient(best_score_GS), key)
  slot_GSK = order.queue(expert_GSK, asked_GSK)
  if config.overflow == Overflow.REROUTE:
    ranking_GSE = jax.lax.stop_gradient(ranking_GSE)
    expert_GSK, slot_GSK = _reroute(order, expert_GSK, slot_GSK, asked_GSK, ranking_GSE, capacity)
  # Dropless, C is S and keeps all: without the comparison, ragged dispatch never counts the queues.
  dropless = config.overflow == Overflow.DROPLESS
  kept_GSK = asked_GSK if dropless else asked_GSK & (slot_GSK < capacity)
  return Placement(expert_GSK, slot_GSK, kept_GSK)


class _Order:
  """The order in which assignments are served."""

  def __init__(self, config, score_GSK, best_score_GS, key):
    self.config = config
    self.score_GSK = score_GSK
    self.token_order_GS = _token_order(config, score_GSK, best_score_GS, key)

  def queue(self, expert_GSK, asked_GSK):
    """Returns (G, S, K) int32: how many earlier assignments ask for the same expert."""
    if self.token_order_GS is None:
      return self._queue(expert_GSK, asked_GSK)
    inverse_GS = jnp.argsort(self.token_order_GS, axis=1)
    place_GSK = self._queue(*(_take(a, self.token_order_GS) for a in (expert_GSK, asked_GSK)))
    return _take(place_GSK, inverse_GS)

  def _queue(self, expert_GSK, asked_GSK):
    G, S, K = expert_GSK.shape
    choice_major = self.config.drop_order == DropOrder.CHOICE_MAJOR

    def flatten(a_GSK):
      return (a_GSK.swapaxes(1, 2) if choice_major else a_GSK).reshape(G, S * K)

    expert_GN, asked_GN = flatten(expert_GSK), flatten(asked_GSK)
    if self.config.priority in (Priority.PROBABILITY, Priority.WEIGHT):
      order_GN = jnp.argsort(-flatten(self.score_GSK), axis=1, stable=True)
      place_GN = _places(*(_take(a, order_GN) for a in (expert_GN, asked_GN)), self.config)
      place_GN = _take(place_GN, jnp.argsort(order_GN, axis=1))
    else:
      place_GN = _places(expert_GN, asked_GN, self.config)
    if choice_major:
      return place_GN.reshape(G, K, S).swapaxes(1, 2)
    return place_GN.reshape(G, S, K)


def _token_order(config, score_GSK, best_score_GS, key):
  """Returns the serving order of tokens (G, S), or None for the order of the sequence."""
  match config.priority:
    case Priority.MAX_SCORE:
      return jnp.argsort(-best_score_GS, axis=1, stable=True)
    case Priority.SUM_SCORE:
      return jnp.argsort(-jnp.sum(score_GSK, axis=-1), axis=1, stable=True)
    case Priority.RANDOM if key is not None:
      return jnp.argsort(jax.random.uniform(key, best_score_GS.shape), axis=1)
    case _:
      return None


def _places(expert_GN, asked_GN, config):
  # Counts are int32: a bfloat16 running sum is wrong beyond 256.
  asks_GNE = jax.nn.one_hot(expert_GN, config.num_experts, dtype=jnp.int32) * asked_GN[..., None]
  ahead_GNE = jnp.cumsum(asks_GNE, axis=1) - asks_GNE
  return _take(ahead_GNE, expert_GN[..., None], axis=2)[..., 0]


def _reroute(order, expert_GSK, slot_GSK, asked_GSK, ranking_GSE, capacity):
  """Lets every assignment without a slot ask the next best expert its token has not selected."""
  config, E = order.config, ranking_GSE.shape[-1]
  ranked_score_GSE, ranked_GSE = row_top_k(ranking_GSE, E)

  def attempt(_, state):
    expert_GSK, slot_GSK, next_GS = state
    kept_GSK = asked_GSK & (slot_GSK < capacity)
    dropped_GSK = asked_GSK & ~kept_GSK
    # The first of a token's dropped choices takes its next best expert, the second the one after.
    at_GSK = next_GS[..., None] + jnp.cumsum(dropped_GSK, axis=-1, dtype=jnp.int32) - 1
    again_GSK = dropped_GSK & (at_GSK < E)
    at_GSK = jnp.clip(at_GSK, 0, E - 1)
    again_GSK &= _take(ranked_score_GSE, at_GSK, axis=-1) > -jnp.inf
    asked_now_GSK = jnp.where(again_GSK, _take(ranked_GSE, at_GSK, axis=-1), expert_GSK)
    taken_GE = _count(expert_GSK, kept_GSK, config)
    taken_GSK = _take(taken_GE[:, None], asked_now_GSK, axis=-1)
    place_GSK = taken_GSK + order.queue(asked_now_GSK, again_GSK)
    slot_GSK = jnp.where(again_GSK, place_GSK, slot_GSK)
    next_GS = next_GS + jnp.sum(dropped_GSK, axis=-1, dtype=jnp.int32)
    return asked_now_GSK, slot_GSK, next_GS

  first_GS = jnp.full(expert_GSK.shape[:2], expert_GSK.shape[-1], jnp.int32)
  state = jax.lax.fori_loop(
    0, config.reroute_attempts, attempt, (expert_GSK, slot_GSK, first_GS), unroll=False
  )
  return state[:2]


def _count(expert_GSK, kept_GSK, config):
  """Returns (G, E) int32, the slots taken."""
  taken = jax.nn.one_hot(expert_GSK, config.num_experts, dtype=jnp.int32) * kept_GSK[..., None]
  return jnp.sum(taken, axis=(1, 2))


def _take(a, index, axis=1):
  """Takes along an axis; an index with fewer axes than `a` counts for all trailing ones."""
  index = index.reshape(index.shape + (1,) * (a.ndim - index.ndim))
  return jnp.take_along_axis(a, index, axis=axis)
