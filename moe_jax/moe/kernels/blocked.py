"""The grouped experts on CPU: a loop over blocks of each expert's rows, from tokens to tokens.

A scan over experts runs a loop over blocks of that expert's rows with a dynamic trip count, so the
work follows the load. A block looks its tokens up, runs the whole network while its rows are in
cache, and adds the results to its tokens: no array of all rows exists in either direction. Such a
loop has no automatic reverse mode; the custom derivative below recomputes each block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.layers.mlp import affine
from moe_jax.layers.parameters import like
from moe_jax.moe.moves import Moves, look_up
from moe_jax.moe.options import WeightOn


def block_lengths(num_rows: int, num_experts: int) -> tuple[int, ...]:
  """Returns rows per block, longest first: up to two thirds of the mean load, 512 at most.

  A short block makes thin products and reads the expert's weights more often; a long one wastes
  work where it is filled in part, half of it on average. So each length is a quarter of the one
  before, and only the shortest, 32, is ever filled in part.
  """
  wanted = max(32, min(512, 2 * num_rows // (3 * num_experts)))
  lengths = [1 << (wanted.bit_length() - 1)]
  while lengths[-1] > 32:
    lengths.append(max(32, lengths[-1] // 4))
  return tuple(lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def blocked_experts(
  network,
  blocks: tuple[int, ...],
  weight_on: WeightOn,
  x: jax.Array,
  weight: jax.Array,
  moves: Moves,
  rows_per_expert: jax.Array,
  weights: Any,
  keys: jax.Array | None,
) -> jax.Array:
  """Sums each token's experts, see `moe_jax.moe.grouped.grouped_experts`.

  Args:
    network: the function of one expert, see `moe_jax.moe.grouped.Network`.
    blocks: rows handled at a time, longest first, see `block_lengths`.
    weight_on: see `moe_jax.moe.grouped.grouped_experts`.
    x: (T, D) tokens.
    weight: (N,) float32, the combine weight of each assignment.
    moves: the rows of the assignments, sorted by expert.
    rows_per_expert: (E,) int32, sums to at most R.
    weights: a pytree of floating arrays whose leaves have a leading axis E.
    keys: (E,) random keys for `network`, or None; each block folds its first row in.

  Returns:
    (T, D) in the dtype of x, summed in float32. Gradients: an expert without rows gets exactly 0;
    those of weights and tokens accumulate in float32 whatever their dtype.
  """
  arrays = x, weight, moves, rows_per_expert, weights, keys
  return _forward(network, blocks, weight_on, *arrays)


def _forward(network, blocks, weight_on, x, weight, moves, rows_per_expert, weights, keys):
  token, scale = _row_tables(moves, weight, blocks)

  def expert(y, per_expert):
    start, size, w, key = per_expert

    def step(first, block, y):
      index, factor = _block(token, scale, start, size, first, block, x.shape[0])
      rows = look_up(x, index)
      out = _weighed(network, weight_on, _block_key(key, first), rows, factor, w)
      return _add(y, index, out)

    return _over_blocks(blocks, size, step, y), None

  y, _ = jax.lax.scan(expert, _sums_like(x), _per_expert(rows_per_expert, weights, keys))
  return y.astype(x.dtype)


def _save(network, blocks, weight_on, *arrays):
  return _forward(network, blocks, weight_on, *arrays), arrays


def _backward(network, blocks, weight_on, saved, dy):
  x, weight, moves, rows_per_expert, weights, keys = saved
  token, scale = _row_tables(moves, weight, blocks)

  def expert(sums, per_expert):
    start, size, w, key = per_expert

    def step(first, block, carry):
      dx, dscale, dw = carry
      index, factor = _block(token, scale, start, size, first, block, x.shape[0])
      run = functools.partial(_weighed, network, weight_on, _block_key(key, first))
      _, vjp = jax.vjp(run, look_up(x, index), factor, w)
      dx_block, dfactor, dw_block = vjp(look_up(dy, index).astype(jnp.float32))
      # What a block writes beyond its expert's rows is 0, and the next expert writes over it.
      dscale = jax.lax.dynamic_update_slice_in_dim(dscale, dfactor, start + first, axis=0)
      return _add(dx, index, dx_block), dscale, jax.tree.map(_plus, dw, dw_block)

    dw = jax.tree.map(_sums_like, w)
    dx, dscale, dw = _over_blocks(blocks, size, step, (*sums, dw))
    return (dx, dscale), jax.tree.map(lambda total, a: total.astype(a.dtype), dw, w)

  sums = (_sums_like(x), _sums_like(scale))
  per_expert = _per_expert(rows_per_expert, weights, keys)
  (dx, dscale), dweights = jax.lax.scan(expert, sums, per_expert)
  dweight = look_up(dscale[: moves.assignment.size], moves.row)
  return dx.astype(x.dtype), dweight, None, None, dweights, None


blocked_experts.defvjp(_save, _backward)


def _weighed(network, weight_on, key, rows, scale, weights):
  """Returns the network's rows, or those of rows, times `scale` (M,), in float32."""
  if weight_on == WeightOn.INPUT:
    rows = (rows.astype(jnp.float32) * scale[:, None]).astype(rows.dtype)
    return network(rows, weights, key, affine, affine).astype(jnp.float32)

  def last_product(hidden, weight, bias=None):
    out = _scaled_matmul(hidden, weight, scale)
    return out if bias is None else out + like(bias, out) * scale[:, None]

  return network(rows, weights, key, affine, last_product).astype(jnp.float32)


@jax.custom_vjp
def _scaled_matmul(rows: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns rows @ weight, rounded to their dtype, times scale (M,) in float32.

  The derivative by the scale is a sum over the rows of dout @ weight.T, which that by the rows
  needs in any case. The automatic one is a sum over the result, a product that nothing else needs.
  """
  return (rows @ weight).astype(jnp.float32) * scale[:, None]


def _save_scaled_matmul(rows, weight, scale):
  return _scaled_matmul(rows, weight, scale), (rows, weight, scale)


def _backward_scaled_matmul(saved, dout):
  rows, weight, scale = saved
  unscaled = (dout.astype(rows.dtype) @ weight.T).astype(jnp.float32)
  drows = (unscaled * scale[:, None]).astype(rows.dtype)
  dweight = rows.T @ (dout * scale[:, None]).astype(rows.dtype)
  return drows, dweight, jnp.sum(unscaled * rows.astype(jnp.float32), axis=1)


_scaled_matmul.defvjp(_save_scaled_matmul, _backward_scaled_matmul)


def _row_tables(moves, weight, blocks):
  """Returns the token and the weight of every row, with one shortest block of empty rows behind."""
  token = look_up(moves.token, moves.assignment, moves.num_tokens)
  scale = look_up(weight.astype(jnp.float32), moves.assignment)
  return (
    jnp.pad(token, (0, blocks[-1]), constant_values=moves.num_tokens),
    jnp.pad(scale, (0, blocks[-1])),
  )


def _per_expert(rows_per_expert, weights, keys):
  starts = jnp.cumsum(rows_per_expert) - rows_per_expert
  return starts, rows_per_expert, weights, keys


def _over_blocks(blocks, size, step, carry):
  """Runs step(first row, block, carry) over `size` rows: whole blocks, and one partly filled.

  Each length takes what whole blocks of it are left by the longer ones, the shortest all the rest.
  """
  done = 0
  for block in blocks:
    left = size - done
    count = (left + block - 1) // block if block == blocks[-1] else left // block

    def run(i, carry, done=done, block=block):
      return step(done + i * block, block, carry)

    carry = jax.lax.fori_loop(0, count, run, carry)
    done += count * block
  return carry


def _block(token, scale, start, size, first, block: int, num_tokens: int):
  """Returns token and weight of a group's rows from `first` on; no token beyond its end.

  Another expert's rows are left out here: 0 * inf would put a NaN into this one's gradient.
  """
  mine = first + jnp.arange(block) < size
  token, scale = (jax.lax.dynamic_slice_in_dim(a, start + first, block) for a in (token, scale))
  return jnp.where(mine, token, num_tokens), jnp.where(mine, scale, 0.0)


def _add(sums, index, rows):
  return sums.at[index].add(rows.astype(sums.dtype), mode="drop")


def _plus(total, part):
  return total + part.astype(total.dtype)


def _sums_like(a):
  return jnp.zeros(a.shape, jnp.float32)


def _block_key(key, first):
  return None if key is None else jax.random.fold_in(key, first)
