"""The two moves behind gather and ragged dispatch, each the other's transpose.

`spread` gives every row its token; `collect` sums every token's weighted rows. The derivative of
one is the other, so neither direction scatters rows, which automatic differentiation of an index
lookup would do: a scatter first writes all N weighted rows to memory, the sum over K lookups none.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax.moe.plan import RoutingPlan


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["token", "row", "assignment"],
  meta_fields=["num_tokens", "top_k"],
)
@dataclasses.dataclass(frozen=True)
class Moves:
  """Which row each of N assignments of T tokens sits in, counted over all groups.

  Attributes:
    token: (N,) int32, the token of each assignment.
    row: (N,) int32, its row; the number of rows where it has none.
    assignment: (R,) int32, the inverse of `row`; N where a row is empty.
    num_tokens: T.
    top_k: K if the assignments of token t are t*K to t*K + K - 1, None in any other order.
  """

  token: jax.Array
  row: jax.Array
  assignment: jax.Array
  num_tokens: int
  top_k: int | None


def make_moves(plan: RoutingPlan, row_GN: jax.Array, num_rows: int) -> Moves:
  """Returns the moves that put assignment n of group g into `row_GN[g, n]`."""
  G, N = plan.token.shape
  row = jnp.where(plan.valid, row_GN, num_rows).reshape(-1)
  assignment = (
    jnp.full((num_rows,), G * N, jnp.int32)
    .at[row]
    .set(jnp.arange(G * N, dtype=jnp.int32), mode="drop")
  )
  return Moves(_global_tokens(plan), row, assignment, G * plan.num_tokens, plan.top_k)


def make_sorted_moves(plan: RoutingPlan, order: jax.Array) -> Moves:
  """Returns the moves into rows sorted by expert.

  `order` (G*N,) int32 names the assignment of each row, those without a slot last.
  """
  row = jnp.arange(order.size, dtype=jnp.int32)
  valid = plan.valid.reshape(-1)
  assignment = jnp.where(row < jnp.sum(valid), order, order.size)
  inverse = jnp.zeros_like(row).at[order].set(row, unique_indices=True)
  num_tokens = plan.token.shape[0] * plan.num_tokens
  return Moves(
    _global_tokens(plan), jnp.where(valid, inverse, order.size), assignment, num_tokens, plan.top_k
  )


def _global_tokens(plan: RoutingPlan) -> jax.Array:
  """Returns (G*N,) int32: the token of each assignment, counted over all groups."""
  groups = jnp.arange(plan.token.shape[0], dtype=jnp.int32)[:, None]
  return (plan.token + plan.num_tokens * groups).reshape(-1)


@jax.custom_vjp
def spread(x: jax.Array, moves: Moves) -> jax.Array:
  """Returns rows (R, D) of tokens x (T, D); an empty row is zeros."""
  return look_up(x, look_up(moves.token, moves.assignment, moves.num_tokens))


def _save_spread(x, moves):
  return spread(x, moves), moves


def _backward_spread(moves, drows):
  return collect(drows, jnp.ones(moves.row.shape, jnp.float32), moves), None


spread.defvjp(_save_spread, _backward_spread)


@jax.custom_vjp
def collect(rows: jax.Array, weight: jax.Array, moves: Moves) -> jax.Array:
  """Returns (T, D): each token's rows times their weights (N,), summed in float32.

  The result has the dtype of `rows`. An assignment without a row adds nothing.
  """
  if moves.top_k is None:
    weighted = look_up(rows, moves.row).astype(jnp.float32) * weight[:, None]
    y = jnp.zeros((moves.num_tokens, rows.shape[1]), jnp.float32).at[moves.token].add(weighted)
  else:
    row_TK, weight_TK = (a.reshape(moves.num_tokens, -1) for a in (moves.row, weight))
    # One lookup a choice, rather than one of (T, K, D), lets XLA fuse them into a single sum.
    y = sum(
      look_up(rows, row_TK[:, k]).astype(jnp.float32) * weight_TK[:, k, None]
      for k in range(moves.top_k)
    )
  return y.astype(rows.dtype)


def _save_collect(rows, weight, moves):
  return collect(rows, weight, moves), (rows, weight, moves)


def _backward_collect(saved, dy):
  rows, weight, moves = saved
  drows = spread(dy, moves).astype(jnp.float32) * look_up(weight, moves.assignment)[:, None]
  return drows.astype(rows.dtype), _products(rows, dy, moves), None


collect.defvjp(_save_collect, _backward_collect)


def _products(rows, dy, moves):
  """Returns (N,) float32: each assignment's row times its token's dy."""

  def product(token_and_row):
    token, row = token_and_row
    return jnp.sum(look_up(rows, row).astype(jnp.float32) * dy[token].astype(jnp.float32), -1)

  # In turns of one choice a token: all N looked-up rows at once would be one more buffer.
  def by_choice(a):
    return a.reshape(-1, moves.top_k or 1).T

  products = jax.lax.map(product, (by_choice(moves.token), by_choice(moves.row)))
  return products.T.reshape(-1)


def look_up(values: jax.Array, index: jax.Array, fill: int = 0) -> jax.Array:
  """Returns values[index], and `fill` where the index lies beyond the values."""
  return values.at[index].get(mode="fill", fill_value=fill)
