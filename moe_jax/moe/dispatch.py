"""Dispatch and combine: two verbs that move tokens to their experts and back.

A dispatcher has `dispatch(x, plan) -> rows` and `combine(results, plan) -> y`. In between, experts
map rows to results. Every form gives the same numbers and drops the same tokens, since
the plan decides both; they differ in time and memory:

| form | rows | cost beyond the expert products |
|---|---|---|
| `einsum` | (E, G*C, D) | 2 * S * E * C * D multiply-adds a group: keep S <= 512 |
| `gather` | (E, G*C, D) | index lookups |
| `ragged` | (G*N, D) sorted by expert | a sort; no capacity buffer, so dropless costs no padding |
"""

import dataclasses
import enum
import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from moe_jax.choices import as_choice
from moe_jax.moe.moves import Moves, collect, make_moves, make_sorted_moves, spread
from moe_jax.moe.options import WeightOn
from moe_jax.moe.plan import DensePlan, RoutingPlan

Plan = RoutingPlan | DensePlan


class Dispatch(enum.StrEnum):
  """How tokens travel to experts: the same result at other costs.

  Dropless routing wants `ragged`: the other two keep a buffer of S slots for every expert. Forms
  draw different masks for `expert_dropout`.
  """

  EINSUM = "einsum"
  GATHER = "gather"
  RAGGED = "ragged"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlottedRows:
  """Tokens in expert buffers: rows (E, G*C, D); an empty slot is a row of zeros."""

  rows: jax.Array


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["x", "weight", "moves", "rows_per_expert"],
  meta_fields=["weight_on"],
)
@dataclasses.dataclass(frozen=True)
class RaggedRows:
  """Which rows (R, D), sorted by expert, the experts are to read; none is copied yet.

  The first `rows_per_expert[0]` rows are for expert 0 and so on; R is the number of assignments.

  Attributes:
    x: (T, D) the tokens of all groups.
    weight: (N,) float32, the combine weight of each assignment.
    moves: the row of each assignment; rows beyond the sum of `rows_per_expert` are empty.
    rows_per_expert: (E,) int32.
    weight_on: whether weights multiply what enters an expert or what leaves it.
  """

  x: jax.Array
  weight: jax.Array
  moves: Moves
  rows_per_expert: jax.Array
  weight_on: WeightOn

  @property
  def rows(self) -> jax.Array:
    """Returns the copied rows (R, D); an empty row is zeros."""
    return spread(self.x, self.moves)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSums:
  """What ragged rows come back as: y (T, D), each token's weighted sum over its experts."""

  y: jax.Array


ExpertRows = SlottedRows | RaggedRows
ExpertResults = SlottedRows | TokenSums


class Dispatcher(Protocol):
  """Moves tokens x (G, S, D) to expert rows, and expert rows back to y (G, S, D)."""

  def dispatch(self, x: jax.Array, plan: Plan) -> ExpertRows:
    """Returns the rows of all experts, in the dtype of x."""

  def combine(self, rows: ExpertResults, plan: Plan) -> jax.Array:
    """Returns each token's weighted sum, taken in float32, in the dtype of the rows."""


class EinsumDispatcher:
  """One-hot dispatch and combine tensors (GShard, arXiv 2006.16668 Algorithm 2).

  Both products have the highest precision: a TPU's default would round float32 tokens and combine
  weights to bfloat16. Combine weighs the rows in their slots and moves them by the mask that
  dispatch used. The combine tensor itself would give the same sums, but its gradient is a product
  as large as the two others; that of a weight in a slot is a sum over D. Soft MoE needs it.
  """

  def dispatch(self, x: jax.Array, plan: Plan) -> SlottedRows:
    """See `Dispatcher`."""
    mask_GSEC = plan.dispatch_mask().astype(x.dtype)
    rows_EGCD = jnp.einsum("GSEC,GSD->EGCD", mask_GSEC, x, precision=jax.lax.Precision.HIGHEST)
    if isinstance(plan, RoutingPlan):
      rows_EGCD = _weighted(rows_EGCD, plan, WeightOn.INPUT).astype(x.dtype)
    return SlottedRows(rows_EGCD.reshape(plan.num_experts, -1, x.shape[-1]))

  def combine(self, rows: SlottedRows, plan: Plan) -> jax.Array:
    """See `Dispatcher`."""
    rows_EGCD, tensor_GSEC = _by_group(rows.rows, plan), plan.combine_weights
    if isinstance(plan, RoutingPlan):
      rows_EGCD, tensor_GSEC = _weighted(rows_EGCD, plan, WeightOn.OUTPUT), plan.dispatch_mask
    y = jnp.einsum(
      "GSEC,EGCD->GSD",
      tensor_GSEC().astype(jnp.float32),
      rows_EGCD.astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    return y.astype(rows.rows.dtype)


class GatherDispatcher:
  """Index tensors: each slot looks its token up, each token looks its slots up."""

  def dispatch(self, x: jax.Array, plan: RoutingPlan) -> SlottedRows:
    """See `Dispatcher`."""
    E, D = plan.num_experts, x.shape[-1]
    rows_END = spread(x.reshape(-1, D), _slot_moves(plan)).reshape(E, -1, D)
    weighted = _weighted(_by_group(rows_END, plan), plan, WeightOn.INPUT)
    return SlottedRows(weighted.astype(x.dtype).reshape(rows_END.shape))

  def combine(self, rows: SlottedRows, plan: RoutingPlan) -> jax.Array:
    """See `Dispatcher`."""
    G, D = plan.token.shape[0], rows.rows.shape[-1]
    weight = plan.weight
    if plan.weight_on == WeightOn.INPUT:
      weight = plan.valid.astype(jnp.float32)
    return collect(rows.rows.reshape(-1, D), weight.reshape(-1), _slot_moves(plan)).reshape(
      G, -1, D
    )


class RaggedDispatcher:
  """Assignments sorted by expert, without buffers (MegaBlocks, arXiv 2211.15841 section 4).

  Dispatch only sorts. The experts look tokens up, weigh and sum, so that combine has nothing left
  to do.
  """

  def dispatch(self, x: jax.Array, plan: RoutingPlan) -> RaggedRows:
    """See `Dispatcher`."""
    E, D = plan.num_experts, x.shape[-1]
    # An assignment without a slot sorts behind all experts, where no group reaches it.
    expert = jnp.where(plan.valid, plan.expert, E).reshape(-1)
    moves = make_sorted_moves(plan, _stable_order(expert, E + 1))
    rows_per_expert = jnp.bincount(expert, length=E).astype(jnp.int32)
    tokens, weight = x.reshape(-1, D), plan.weight.reshape(-1)
    return RaggedRows(tokens, weight, moves, rows_per_expert, plan.weight_on)

  def combine(self, rows: TokenSums, plan: RoutingPlan) -> jax.Array:
    """See `Dispatcher`."""
    return rows.y.reshape(plan.token.shape[0], plan.num_tokens, -1)


_DISPATCHERS = {
  Dispatch.EINSUM: EinsumDispatcher(),
  Dispatch.GATHER: GatherDispatcher(),
  Dispatch.RAGGED: RaggedDispatcher(),
}


def get_dispatcher(form: Dispatch) -> Dispatcher:
  """Returns the dispatcher of that form."""
  return _DISPATCHERS[as_choice(Dispatch, "dispatch", form)]


def _by_group(rows_END: jax.Array, plan: Plan) -> jax.Array:
  """(E, G*C, D) -> (E, G, C, D)."""
  return rows_END.reshape(plan.num_experts, -1, plan.capacity, rows_END.shape[-1])


def _weighted(rows_EGCD: jax.Array, plan: RoutingPlan, side: WeightOn) -> jax.Array:
  """Multiplies rows by their tokens' weights, in float32, on the side where the plan wants it."""
  if plan.weight_on != side:
    return rows_EGCD
  return rows_EGCD.astype(jnp.float32) * _slot_weights(plan)[..., None]


def _stable_order(values: jax.Array, bound: int) -> jax.Array:
  """Returns the stable argsort (N,) int32 of values (N,) in [0, bound)."""
  N = values.size
  if bound * N > jnp.iinfo(jnp.int32).max:
    return jnp.argsort(values, stable=True).astype(jnp.int32)
  # One array of distinct keys sorts four times as fast on CPU as values and indices together.
  return jnp.sort(values * N + jnp.arange(N, dtype=jnp.int32), stable=False) % N


def _slot_weights(plan: RoutingPlan) -> jax.Array:
  """Returns (E, G, C) float32: the combine weight of the token in each slot; 0 in an empty one."""
  groups_GN = jnp.arange(plan.token.shape[0])[:, None]
  shape = (plan.num_experts, plan.token.shape[0], plan.capacity)
  slot_GN = jnp.where(plan.valid, plan.slot, plan.capacity)
  return (
    jnp.zeros(shape, plan.weight.dtype)
    .at[plan.expert, groups_GN, slot_GN]
    .set(plan.weight, mode="drop")
  )


def _slot_moves(plan: RoutingPlan) -> Moves:
  """Returns the moves into slots, flattened as (E, G, C)."""
  G, C = plan.expert.shape[0], plan.capacity
  slot_GN = (plan.expert * G + jnp.arange(G, dtype=jnp.int32)[:, None]) * C + plan.slot
  return make_moves(plan, slot_GN, plan.num_experts * G * C)
