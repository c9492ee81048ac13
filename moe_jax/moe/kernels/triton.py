"""The grouped products on GPU: two Pallas kernels, lowered through Triton.

XLA's own `ragged_dot` expands to a dense product over all experts here, at least for the weight
gradient. A tile of rows belongs to one group alone: a group's last tile is masked, not shared.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclasses.dataclass(frozen=True)
class Triton:
  """See `moe_jax.moe.kernels.products.Kernels`; `interpret` runs anywhere, slowly, for tests.

  rows_tile, out_tile, depth_tile: powers of two, at least 16, as tensor cores want them. `multiply`
    makes (rows_tile, out_tile) at a time over depths of depth_tile; `outer` makes
    (rows_tile, out_tile) of a weight over depth_tile rows.
  """

  rows_tile: int = 128
  out_tile: int = 128
  depth_tile: int = 64
  interpret: bool = False

  def multiply(
    self, rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, transpose: bool
  ) -> jax.Array:
    """See `Kernels`."""
    num_rows = rows.shape[0]
    out_dim = weights.shape[1 if transpose else 2]
    tiles = _row_tiles(group_sizes, num_rows, self.rows_tile)
    num_tiles = tiles[0].size
    return pl.pallas_call(
      functools.partial(_multiply_kernel, self, transpose, num_tiles),
      out_shape=jax.ShapeDtypeStruct((num_rows, out_dim), rows.dtype),
      grid=(num_tiles * pl.cdiv(out_dim, self.out_tile),),
      compiler_params=self._compiler_params(rows.dtype),
      interpret=self.interpret,
      name="grouped_multiply",
    )(*tiles, rows, weights)

  def outer(
    self, rows: jax.Array, others: jax.Array, group_sizes: jax.Array, dtype: jax.typing.DTypeLike
  ) -> jax.Array:
    """See `Kernels`."""
    ends = jnp.cumsum(group_sizes)
    shape = (group_sizes.size, rows.shape[1], others.shape[1])
    return pl.pallas_call(
      functools.partial(_outer_kernel, self),
      out_shape=jax.ShapeDtypeStruct(shape, dtype),
      grid=(shape[0], pl.cdiv(shape[1], self.rows_tile), pl.cdiv(shape[2], self.out_tile)),
      compiler_params=self._compiler_params(rows.dtype),
      interpret=self.interpret,
      name="grouped_outer",
    )(ends - group_sizes, ends, rows, others)

  def _compiler_params(self, dtype):
    # Four stages of two bfloat16 tiles are 128 KiB of shared memory, of 163 (A100) or 227 (H100).
    stages = 4 if jnp.dtype(dtype).itemsize <= 2 else 2
    return plgpu.CompilerParams(num_warps=8, num_stages=stages)


# Programs that run at once share the weights and rows they read when they make a compact patch of
# the result: this many tiles of rows wide.
_PATCH = 8


def _row_tiles(group_sizes: jax.Array, num_rows: int, tile: int):
  """Returns group, first row and end of the group for every tile, each (tiles,) int32.

  The rows beyond the groups make a last group E. There are as many tiles as the worst sizes need:
  those left over lie beyond the end of group E.
  """
  num_groups = group_sizes.size
  sizes = jnp.append(group_sizes, num_rows - jnp.sum(group_sizes)).astype(jnp.int32)
  ends, tile_ends = jnp.cumsum(sizes), jnp.cumsum(pl.cdiv(sizes, tile))
  index = jnp.arange(pl.cdiv(num_rows, tile) + num_groups, dtype=jnp.int32)
  group = jnp.minimum(jnp.searchsorted(tile_ends, index, side="right"), num_groups)
  behind = tile_ends[group] - index
  # Counted back from the group's last tile, which starts at a whole number of tiles.
  start = (ends - sizes)[group] + (pl.cdiv(sizes, tile)[group] - behind) * tile
  return group.astype(jnp.int32), start.astype(jnp.int32), ends[group].astype(jnp.int32)


def _multiply_kernel(
  config, transpose, num_tiles, group_ref, start_ref, end_ref, rows_ref, weights_ref, out_ref
):
  tile, column = _patchwise(pl.program_id(0), num_tiles, pl.cdiv(out_ref.shape[1], config.out_tile))
  group, start, end = group_ref[tile], start_ref[tile], end_ref[tile]
  mine = start + jnp.arange(config.rows_tile) < end
  first_out = column * config.out_tile
  depth = rows_ref.shape[1]

  def step(i, total):
    first = i * config.depth_tile
    a = _load(rows_ref, start, first, config.rows_tile, config.depth_tile, mine)
    if transpose:
      b = _load(weights_ref, first_out, first, config.out_tile, config.depth_tile, group=group)
    else:
      b = _load(weights_ref, first, first_out, config.depth_tile, config.out_tile, group=group)
    return total + plgpu.dot(a, b, trans_b=transpose)

  # The rows beyond the groups are written as the zeros that the sum starts from.
  real = (group < weights_ref.shape[0]) & (start < end)
  steps = jnp.where(real, pl.cdiv(depth, config.depth_tile), 0)
  total = jax.lax.fori_loop(0, steps, step, jnp.zeros((config.rows_tile, config.out_tile)))
  _store(out_ref, start, first_out, total, mine)


def _outer_kernel(config, start_ref, end_ref, rows_ref, others_ref, out_ref):
  group = pl.program_id(0)
  first, first_out = pl.program_id(1) * config.rows_tile, pl.program_id(2) * config.out_tile
  start, end = start_ref[group], end_ref[group]

  def step(i, total):
    at = start + i * config.depth_tile
    mine = at + jnp.arange(config.depth_tile) < end
    a = _load(rows_ref, at, first, config.depth_tile, config.rows_tile, mine)
    b = _load(others_ref, at, first_out, config.depth_tile, config.out_tile, mine)
    return total + plgpu.dot(a, b, trans_a=True)

  steps = pl.cdiv(end - start, config.depth_tile)
  total = jax.lax.fori_loop(0, steps, step, jnp.zeros((config.rows_tile, config.out_tile)))
  mine = first + jnp.arange(config.rows_tile) < out_ref.shape[1]
  _store(out_ref, first, first_out, total, mine, group=group)


def _patchwise(index, num_tiles: int, num_columns: int):
  """Returns the tile of rows and the column of program `index`, walking patch by patch."""
  patch = index // (_PATCH * num_columns)
  height = jnp.minimum(num_tiles - patch * _PATCH, _PATCH)
  within = index - patch * _PATCH * num_columns
  return patch * _PATCH + within % height, within // height


def _load(ref, row, column, num_rows: int, num_columns: int, mine=None, group=None):
  """Reads a tile, of one group if given; 0 beyond the array and in rows that are not `mine`."""
  if mine is None:
    mine = row + jnp.arange(num_rows) < ref.shape[-2]
  tile, inside = _tile(ref, row, column, (num_rows, num_columns), group)
  return plgpu.load(tile, mask=mine[:, None] & inside, other=0)


def _store(ref, row, column, values, mine, group=None):
  tile, inside = _tile(ref, row, column, values.shape, group)
  plgpu.store(tile, values.astype(ref.dtype), mask=mine[:, None] & inside)


def _tile(ref, row, column, shape, group):
  """Returns the tile's reference, and which of its columns (1, columns) the array has."""
  inside = column + jnp.arange(shape[1]) < ref.shape[-1]
  where = (pl.ds(row, shape[0]), pl.ds(column, shape[1]))
  return ref.at[where if group is None else (group, *where)], inside[None, :]
