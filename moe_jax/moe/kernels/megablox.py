"""The grouped products on TPU: JAX's Megablox kernels (MegaBlocks, arXiv 2211.15841).

`gmm` and `tgmm` walk over tiles of rows; a tile that two groups share is visited once for each.
They leave rows beyond the groups unwritten, and want whole tiles of rows: both is mended here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

# The largest tiles of a bfloat16 weight whose double-buffered blocks fit, beside 512 rows, into the
# 16 MiB of vector memory that a kernel gets; compiled for v4, v5e, v5p and v6e.
_MULTIPLY_TILE = (1024, 1024)
_OUTER_TILE = (512, 1024)
# Rows of a tile come in multiples of the 16 sublanes of a packed bfloat16 register.
_ROW_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class Megablox:
  """See `moe_jax.moe.kernels.products.Kernels`; `interpret` runs anywhere, slowly, for tests.

  rows_tile: rows at a time, a multiple of 16.
  """

  rows_tile: int = 512
  interpret: bool = False

  def multiply(
    self, rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, transpose: bool
  ) -> jax.Array:
    """See `Kernels`."""
    out_dim = weights.shape[1 if transpose else 2]
    tiling = self._tiling(_MULTIPLY_TILE, rows, out_dim)
    out = gmm(
      _whole_tiles(rows, tiling[0]),
      weights,
      group_sizes,
      rows.dtype,
      tiling,
      transpose_rhs=transpose,
      interpret=self.interpret,
    )[: rows.shape[0]]
    served = jnp.arange(rows.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(served[:, None], out, 0)

  def outer(
    self, rows: jax.Array, others: jax.Array, group_sizes: jax.Array, dtype: jax.typing.DTypeLike
  ) -> jax.Array:
    """See `Kernels`."""
    tiling = self._tiling(_OUTER_TILE, rows, others.shape[1])
    return tgmm(
      _whole_tiles(rows, tiling[0]).T,
      _whole_tiles(others, tiling[0]),
      group_sizes,
      dtype,
      tiling,
      interpret=self.interpret,
    )

  def _tiling(self, largest: tuple[int, int], rows: jax.Array, out_dim: int):
    """Returns tiles no larger than the arrays; the kernels mask what overhangs a weight."""
    num_rows = min(self.rows_tile, -(-rows.shape[0] // _ROW_MULTIPLE) * _ROW_MULTIPLE)
    depth = 2 * largest[0] // rows.dtype.itemsize
    return num_rows, min(depth, rows.shape[1]), min(largest[1], out_dim)


def _whole_tiles(rows: jax.Array, tile: int) -> jax.Array:
  """Pads rows with zeros to a multiple of the tile."""
  return jnp.pad(rows, ((0, -rows.shape[0] % tile), (0, 0)))
