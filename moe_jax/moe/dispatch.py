"""Dispatch and combine: two verbs that move tokens to their experts and back.

A dispatcher has `dispatch(x, plan) -> rows` and `combine(rows, plan) -> y`. In between, experts map
rows to rows of the same layout. Every form gives the same numbers and drops the same tokens, since
the plan decides both; they differ in time and memory:

| form | rows | cost beyond the expert products |
|---|---|---|
| `einsum` | (E, G*C, D) | 2 * S * E * C * D multiply-adds a group: keep groups small (<= 512 tokens) |
| `gather` | (E, G*C, D) | index lookups |
| `ragged` | (G*N, D) sorted by expert | a sort; no capacity buffer, so dropless costs no padding |
"""

import dataclasses
import enum
from typing import Protocol

import jax
import jax.numpy as jnp

from moe_jax.choices import as_choice
from moe_jax.moe.types import RoutingPlan


class Dispatch(enum.StrEnum):
  """How tokens travel to experts; a choice of speed, never of result."""

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
  """Tokens sorted by expert: rows (G*N, D), the first `group_sizes[0]` for expert 0 and so on.

  group_sizes: (E,) int32. Rows beyond their sum are zeros and belong to no expert.
  position: (G, N) int32, the row of each assignment of the plan.
  """

  rows: jax.Array
  group_sizes: jax.Array
  position: jax.Array


ExpertRows = SlottedRows | RaggedRows


class Dispatcher(Protocol):
  """Moves tokens x (G, S, D) to expert rows, and expert rows back to y (G, S, D)."""

  def dispatch(self, x: jax.Array, plan: RoutingPlan) -> ExpertRows: ...

  def combine(self, rows: ExpertRows, plan: RoutingPlan) -> jax.Array: ...


class EinsumDispatcher:
  """One-hot dispatch and combine tensors (GShard, arXiv 2006.16668 Algorithm 2)."""

  def dispatch(self, x: jax.Array, plan: RoutingPlan) -> SlottedRows:
    mask_GSEC = plan.dispatch_mask().astype(x.dtype)
    rows_EGCD = jnp.einsum("GSEC,GSD->EGCD", mask_GSEC, x)
    return SlottedRows(rows_EGCD.reshape(plan.num_experts, -1, x.shape[-1]))

  def combine(self, rows: SlottedRows, plan: RoutingPlan) -> jax.Array:
    rows_EGCD = _by_group(rows.rows, plan)
    y = jnp.einsum("GSEC,EGCD->GSD", plan.combine_weights(), rows_EGCD.astype(jnp.float32))
    return y.astype(rows.rows.dtype)


class GatherDispatcher:
  """Index tensors: each slot looks its token up, each token looks its slots up."""

  def dispatch(self, x: jax.Array, plan: RoutingPlan) -> SlottedRows:
    G, S, D = x.shape
    E, C = plan.num_experts, plan.capacity
    slot_GN = _flat_slot(plan)
    token_GN = plan.token + S * jnp.arange(G, dtype=jnp.int32)[:, None]
    # An empty slot points one past the last token and reads zeros.
    source = jnp.full((E * G * C,), G * S, jnp.int32).at[slot_GN.reshape(-1)].set(
      token_GN.reshape(-1), mode="drop", unique_indices=True)
    rows = x.reshape(G * S, D).at[source].get(mode="fill", fill_value=0)
    return SlottedRows(rows.reshape(E, G * C, D))

  def combine(self, rows: SlottedRows, plan: RoutingPlan) -> jax.Array:
    flat = rows.rows.reshape(-1, rows.rows.shape[-1])
    taken_GND = flat.at[_flat_slot(plan)].get(mode="fill", fill_value=0)
    return _weighted_sum(taken_GND, plan)


class RaggedDispatcher:
  """Assignments sorted by expert, without buffers (MegaBlocks, arXiv 2211.15841 section 4)."""

  def dispatch(self, x: jax.Array, plan: RoutingPlan) -> RaggedRows:
    G, S, D = x.shape
    E, N = plan.num_experts, plan.expert.shape[1]
    # An assignment without a slot sorts behind all experts, where no group reaches it.
    expert = jnp.where(plan.valid, plan.expert, E).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    position = jnp.zeros_like(order).at[order].set(
      jnp.arange(G * N, dtype=order.dtype), unique_indices=True)
    token = (plan.token + S * jnp.arange(G, dtype=jnp.int32)[:, None]).reshape(-1)
    served = expert[order] < E
    rows = jnp.where(served[:, None], x.reshape(G * S, D)[token[order]], 0)
    return RaggedRows(rows, jnp.bincount(expert, length=E).astype(jnp.int32),
                      position.reshape(G, N))

  def combine(self, rows: RaggedRows, plan: RoutingPlan) -> jax.Array:
    return _weighted_sum(rows.rows[rows.position], plan)


_DISPATCHERS = {
  Dispatch.EINSUM: EinsumDispatcher(),
  Dispatch.GATHER: GatherDispatcher(),
  Dispatch.RAGGED: RaggedDispatcher(),
}


def get_dispatcher(form: Dispatch) -> Dispatcher:
  """Returns the dispatcher of that form."""
  return _DISPATCHERS[as_choice(Dispatch, "dispatch", form)]


def _by_group(rows_END: jax.Array, plan: RoutingPlan) -> jax.Array:
  """(E, G*C, D) -> (E, G, C, D)."""
  return rows_END.reshape(plan.num_experts, -1, plan.capacity, rows_END.shape[-1])


def _flat_slot(plan: RoutingPlan) -> jax.Array:
  """Returns (G, N) int32 indices into the rows of all experts; out of range where not valid."""
  G, C = plan.expert.shape[0], plan.capacity
  group_GN = jnp.arange(G, dtype=jnp.int32)[:, None]
  slot_GN = (plan.expert * G + group_GN) * C + plan.slot
  # Distinct out-of-range values keep the promise of unique indices.
  beyond_GN = plan.num_experts * G * C + jnp.arange(plan.expert.size, dtype=jnp.int32).reshape(
    plan.expert.shape)
  return jnp.where(plan.valid, slot_GN, beyond_GN)


def _weighted_sum(taken_GND: jax.Array, plan: RoutingPlan) -> jax.Array:
  """Sums each token's weighted rows in float32 and returns (G, S, D) in the rows' dtype."""
  G, _, D = taken_GND.shape
  weighted_GND = taken_GND.astype(jnp.float32) * plan.weight[..., None]
  groups_GN = jnp.arange(G)[:, None]
  y = jnp.zeros((G, plan.num_tokens, D), jnp.float32).at[groups_GN, plan.token].add(weighted_GND)
  return y.astype(taken_GND.dtype)
