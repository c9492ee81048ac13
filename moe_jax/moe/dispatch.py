"""Dispatch and combine: two verbs that move tokens to their experts and back.

A dispatcher has `dispatch(x, plan) -> rows` and `combine(rows, plan) -> y`. In between, experts map
rows to rows of the same layout. Every form gives the same numbers and drops the same tokens, since
the plan decides both; they differ in time and memory:

| form | rows | cost beyond the expert products |
|---|---|---|
| `einsum` | (E, G*C, D) | 2 * S * E * C * D multiply-adds a group: keep S <= 512 |
| `gather` | (E, G*C, D) | index lookups |
| `ragged` | (G*N, D) sorted by expert | a sort; no capacity buffer, so dropless costs no padding |
"""

import dataclasses
import enum
from typing import Protocol

import jax
import jax.numpy as jnp

from moe_jax.choices import as_choice
from moe_jax.moe.moves import Moves, collect, make_moves, row_weights, spread
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedRows:
  """Tokens sorted by expert: rows (G*N, D), the first `rows_per_expert[0]` for expert 0 and so on.

  rows_per_expert: (E,) int32. Rows beyond their sum are zeros and belong to no expert.
  position: (G, N) int32, the row of each assignment of the plan.
  """

  rows: jax.Array
  rows_per_expert: jax.Array
  position: jax.Array


ExpertRows = SlottedRows | RaggedRows


class Dispatcher(Protocol):
  """Moves tokens x (G, S, D) to expert rows, and expert rows back to y (G, S, D)."""

  def dispatch(self, x: jax.Array, plan: Plan) -> ExpertRows:
    """Returns the rows of all experts, in the dtype of x."""

  def combine(self, rows: ExpertRows, plan: Plan) -> jax.Array:
    """Returns each token's weighted sum, taken in float32, in the dtype of the rows."""


class EinsumDispatcher:
  """One-hot dispatch and combine tensors (GShard, arXiv 2006.16668 Algorithm 2).

  Both products have the highest precision: a TPU's default would round float32 tokens and combine
  weights to bfloat16.
  """

  def dispatch(self, x: jax.Array, plan: Plan) -> SlottedRows:
    """See `Dispatcher`."""
    first, _ = _tensors(plan)
    mask_GSEC = first.astype(x.dtype)
    rows_EGCD = jnp.einsum("GSEC,GSD->EGCD", mask_GSEC, x, precision=jax.lax.Precision.HIGHEST)
    return SlottedRows(rows_EGCD.reshape(plan.num_experts, -1, x.shape[-1]))

  def combine(self, rows: SlottedRows, plan: Plan) -> jax.Array:
    """See `Dispatcher`."""
    _, second = _tensors(plan)
    y = jnp.einsum(
      "GSEC,EGCD->GSD",
      second.astype(jnp.float32),
      _by_group(rows.rows, plan).astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    return y.astype(rows.rows.dtype)


def _tensors(plan: Plan) -> tuple[jax.Array, jax.Array]:
  """Returns what multiplies tokens on their way in and rows on their way out, (G, S, E, C)."""
  if isinstance(plan, RoutingPlan) and plan.weight_on == WeightOn.INPUT:
    return plan.combine_weights(), plan.dispatch_mask()
  return plan.dispatch_mask(), plan.combine_weights()


class GatherDispatcher:
  """Index tensors: each slot looks its token up, each token looks its slots up."""

  def dispatch(self, x: jax.Array, plan: RoutingPlan) -> SlottedRows:
    """See `Dispatcher`."""
    E, D = plan.num_experts, x.shape[-1]
    rows = _weighted_in(spread(x.reshape(-1, D), _slot_moves(plan)), _slot_moves(plan), plan)
    return SlottedRows(rows.reshape(E, -1, D))

  def combine(self, rows: SlottedRows, plan: RoutingPlan) -> jax.Array:
    """See `Dispatcher`."""
    G, D = plan.token.shape[0], rows.rows.shape[-1]
    flat = rows.rows.reshape(-1, D)
    return collect(flat, _weight_out(plan), _slot_moves(plan)).reshape(G, -1, D)


class RaggedDispatcher:
  """Assignments sorted by expert, without buffers (MegaBlocks, arXiv 2211.15841 section 4)."""

  def dispatch(self, x: jax.Array, plan: RoutingPlan) -> RaggedRows:
    """See `Dispatcher`."""
    E, D = plan.num_experts, x.shape[-1]
    # An assignment without a slot sorts behind all experts, where no group reaches it.
    expert = jnp.where(plan.valid, plan.expert, E).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    position = (
      jnp.zeros_like(order)
      .at[order]
      .set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
      .reshape(plan.expert.shape)
    )
    moves = make_moves(plan, position, order.size)
    rows = _weighted_in(spread(x.reshape(-1, D), moves), moves, plan)
    return RaggedRows(rows, jnp.bincount(expert, length=E).astype(jnp.int32), position)

  def combine(self, rows: RaggedRows, plan: RoutingPlan) -> jax.Array:
    """See `Dispatcher`."""
    G, D = plan.token.shape[0], rows.rows.shape[-1]
    moves = make_moves(plan, rows.position, rows.rows.shape[0])
    return collect(rows.rows, _weight_out(plan), moves).reshape(G, -1, D)


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


def _weighted_in(rows: jax.Array, moves: Moves, plan: RoutingPlan) -> jax.Array:
  """Multiplies rows by their weights where the plan puts those on the input."""
  if plan.weight_on == WeightOn.OUTPUT:
    return rows
  return (rows.astype(jnp.float32) * row_weights(plan.weight, moves)).astype(rows.dtype)


def _weight_out(plan: RoutingPlan) -> jax.Array:
  """Returns what multiplies each assignment's row on its way out, (G*N,) float32."""
  weight = plan.weight if plan.weight_on == WeightOn.OUTPUT else plan.valid.astype(jnp.float32)
  return weight.reshape(-1)


def _slot_moves(plan: RoutingPlan) -> Moves:
  """Returns the moves into slots, flattened as (E, G, C)."""
  G, C = plan.expert.shape[0], plan.capacity
  slot_GN = (plan.expert * G + jnp.arange(G, dtype=jnp.int32)[:, None]) * C + plan.slot
  return make_moves(plan, slot_GN, plan.num_experts * G * C)
