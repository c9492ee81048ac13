"""Grouped products without a capacity buffer: one function applied to each expert's own rows.

`jax.lax.ragged_dot` lowers on CPU to a masked product over all experts (E times the work and the
memory), and its weight gradient does so on most accelerators. Here a scan over experts runs a loop
over blocks of that expert's rows with a dynamic trip count, so the work follows the load. Such a
loop has no automatic reverse mode; the custom derivative below recomputes each block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# fn(rows (M, D), weights of one expert, key or None) -> rows (M, D')
RowFunction = Callable[[jax.Array, Any, jax.Array | None], jax.Array]


def block_rows(num_rows: int, num_experts: int) -> int:
  """Returns rows per block: a quarter of the mean load, a power of two between 32 and 256.

  A larger block wastes work on an expert's last, partly filled block; a smaller one makes thin
  products and reads the expert's weights more often.
  """
  quarter = max(1, num_rows // (4 * num_experts))
  return min(256, max(32, 1 << (quarter.bit_length() - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped_apply(
  fn: RowFunction, block: int, rows: jax.Array, rows_per_expert: jax.Array, weights: Any, keys: Any
) -> jax.Array:
  """Applies `fn` to consecutive groups of rows, group e with `weights[e]`.

  Args:
    fn: maps rows of one expert to rows of the same width, each row on its own.
    block: rows handled at a time, see `block_rows`; all rows if there are fewer.
    rows: (N, D), sorted by expert.
    rows_per_expert: (E,) int32, sums to at most N.
    weights: a pytree of floating arrays whose leaves have a leading axis E.
    keys: (E,) random keys for `fn`, or None.

  Returns:
    (N, D); rows beyond the last group are zeros. Gradients: an expert without rows gets exactly 0;
    weight gradients accumulate in float32 whatever the dtype of rows and weights.
  """
  return _forward(fn, block, rows, rows_per_expert, weights, keys)


def _forward(fn, block, rows, rows_per_expert, weights, keys):
  block = min(block, rows.shape[0])

  def expert(out, per_expert):
    start, size, w, key = per_expert

    def step(i, out):
      at, mine = _block(start, size, i, block, rows.shape[0])
      y = fn(_read(rows, at, block), w, _block_key(key, i))
      return _write(out, y, at, mine)

    return jax.lax.fori_loop(0, _num_blocks(size, block), step, out), None

  out, _ = jax.lax.scan(expert, jnp.zeros_like(rows), _per_expert(rows_per_expert, weights, keys))
  return out


def _save(fn, block, rows, rows_per_expert, weights, keys):
  out = _forward(fn, block, rows, rows_per_expert, weights, keys)
  return out, (rows, rows_per_expert, weights, keys)


def _backward(fn, block, saved, dout):
  rows, rows_per_expert, weights, keys = saved
  block = min(block, rows.shape[0])

  def expert(drows, per_expert):
    start, size, w, key = per_expert

    def step(i, carry):
      drows, dw = carry
      at, mine = _block(start, size, i, block, rows.shape[0])
      # Another expert's rows too are cleared: 0 * inf would put a NaN into this one's gradient.
      x = jnp.where(mine, _read(rows, at, block), 0)
      dy = jnp.where(mine, _read(dout, at, block), 0)
      _, vjp = jax.vjp(lambda x, w: fn(x, w, _block_key(key, i)), x, w)
      dx, dw_block = vjp(dy)
      dw = jax.tree.map(lambda total, part: total + part.astype(jnp.float32), dw, dw_block)
      return _write(drows, dx, at, mine), dw

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), w)
    drows, dw = jax.lax.fori_loop(0, _num_blocks(size, block), step, (drows, zeros))
    return drows, jax.tree.map(lambda total, a: total.astype(a.dtype), dw, w)

  per_expert = _per_expert(rows_per_expert, weights, keys)
  drows, dweights = jax.lax.scan(expert, jnp.zeros_like(rows), per_expert)
  return drows, None, dweights, None


grouped_apply.defvjp(_save, _backward)


def _per_expert(rows_per_expert, weights, keys):
  starts = jnp.cumsum(rows_per_expert) - rows_per_expert
  return starts, rows_per_expert, weights, keys


def _num_blocks(size, block: int):
  return (size + block - 1) // block


def _block(start, size, i, block: int, num_rows: int):
  """Returns where block i of a group starts, and which of its rows (block, 1) are its own.

  The last block of all groups is moved up to end with the rows, which saves a padded copy of them;
  what it then shares with the block before, or with another expert, is not its own.
  """
  first = start + i * block
  at = jnp.minimum(first, num_rows - block)
  index = at + jnp.arange(block)
  return at, ((index >= first) & (index < start + size))[:, None]


def _read(rows, at, block: int):
  return jax.lax.dynamic_slice_in_dim(rows, at, block)


def _write(rows, values, at, mine):
  kept = jnp.where(mine, values.astype(rows.dtype), _read(rows, at, mine.shape[0]))
  return jax.lax.dynamic_update_slice_in_dim(rows, kept, at, axis=0)


def _block_key(key, i):
  return None if key is None else jax.random.fold_in(key, i)
