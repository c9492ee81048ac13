"""Grouped products without a capacity buffer: one function applied to each expert's own rows.

`jax.lax.ragged_dot` lowers on CPU to a masked product over all experts (E times the work and the
memory), and its weight gradient does so on most accelerators. Here a scan over experts runs a loop
over blocks of that expert's rows with a dynamic trip count, so the work follows the load. Such a
loop has no automatic reverse mode; the custom derivative below recomputes each block.
"""

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

# fn(rows (M, D), weights of one expert, key or None) -> rows (M, D')
RowFunction = Callable[[jax.Array, Any, jax.Array | None], jax.Array]


def block_rows(num_rows: int, num_experts: int) -> int:
  """Returns rows per block: about the mean load, a power of two between 8 and 256.

  A larger block wastes work on an expert's last, partly filled block; a smaller one makes slow,
  thin products.
  """
  mean = max(1, num_rows // num_experts)
  return min(256, max(8, 1 << (mean.bit_length() - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped_apply(
  fn: RowFunction, block: int, rows: jax.Array, group_sizes: jax.Array, weights: Any, keys: Any
) -> jax.Array:
  """Applies `fn` to consecutive groups of rows, group e with `weights[e]`.

  Args:
    fn: maps rows of one expert to rows of the same width, each row on its own.
    block: rows handled at a time, see `block_rows`.
    rows: (N, D), sorted by expert.
    group_sizes: (E,) int32, sums to at most N.
    weights: a pytree of floating arrays whose leaves have a leading axis E.
    keys: (E,) random keys for `fn`, or None.

  Returns:
    (N, D); rows beyond the last group are zeros. Gradients: an expert without rows gets exactly 0;
    weight gradients accumulate in float32 whatever the dtype of rows and weights.
  """
  return _forward(fn, block, rows, group_sizes, weights, keys)


def _forward(fn, block, rows, group_sizes, weights, keys):
  N, D = rows.shape
  padded = jnp.pad(rows, ((0, block), (0, 0)))

  def expert(out, per_expert):
    start, size, w, key = per_expert

    def step(i, out):
      at = start + i * block
      x = jax.lax.dynamic_slice_in_dim(padded, at, block)
      y = fn(x, w, _block_key(key, i))
      # What this block writes beyond its group, the next expert overwrites or the mask clears.
      return jax.lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), at, axis=0)

    return jax.lax.fori_loop(0, _num_blocks(size, block), step, out), None

  out, _ = jax.lax.scan(expert, jnp.zeros_like(padded), _per_expert(group_sizes, weights, keys))
  served = jnp.arange(N) < jnp.sum(group_sizes)
  return jnp.where(served[:, None], out[:N], 0)


def _save(fn, block, rows, group_sizes, weights, keys):
  out = _forward(fn, block, rows, group_sizes, weights, keys)
  return out, (rows, group_sizes, weights, keys)


def _backward(fn, block, saved, dout):
  rows, group_sizes, weights, keys = saved
  N, _ = rows.shape
  pad = lambda a: jnp.pad(a, ((0, block), (0, 0)))
  padded, dpadded = pad(rows), pad(dout)

  def expert(drows, per_expert):
    start, size, w, key = per_expert

    def step(i, carry):
      drows, dw = carry
      at = start + i * block
      mine = (i * block + jnp.arange(block) < size)[:, None]
      # The next expert's rows too are cleared: 0 * inf would put a NaN into this one's gradient.
      x = jnp.where(mine, jax.lax.dynamic_slice_in_dim(padded, at, block), 0)
      dy = jnp.where(mine, jax.lax.dynamic_slice_in_dim(dpadded, at, block), 0)
      _, vjp = jax.vjp(lambda x, w: fn(x, w, _block_key(key, i)), x, w)
      dx, dw_block = vjp(dy)
      dw = jax.tree.map(lambda total, part: total + part.astype(jnp.float32), dw, dw_block)
      return jax.lax.dynamic_update_slice_in_dim(drows, dx, at, axis=0), dw

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), w)
    drows, dw = jax.lax.fori_loop(0, _num_blocks(size, block), step, (drows, zeros))
    return drows, jax.tree.map(lambda total, a: total.astype(a.dtype), dw, w)

  drows, dweights = jax.lax.scan(
    expert, jnp.zeros_like(padded), _per_expert(group_sizes, weights, keys))
  served = jnp.arange(N) < jnp.sum(group_sizes)
  return jnp.where(served[:, None], drows[:N], 0), None, dweights, None


grouped_apply.defvjp(_save, _backward)


def _per_expert(group_sizes, weights, keys):
  starts = jnp.cumsum(group_sizes) - group_sizes
  return starts, group_sizes, weights, keys


def _num_blocks(size, block: int):
  return (size + block - 1) // block


def _block_key(key, i):
  return None if key is None else jax.random.fold_in(key, i)
