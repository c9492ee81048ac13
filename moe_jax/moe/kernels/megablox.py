"""The grouped products on TPU: JAX's Megablox kernels (MegaBlocks, arXiv 2211.15841).

`gmm` and `tgmm` walk over tiles of rows; a tile that two groups share is visited once for each.
They leave rows beyond the groups unwritten, and want whole tiles of rows: both is mended here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

# The largest tiles of bfloat16 (rows and the two axes of a weight) whose double-buffered blocks fit
# the 16 MiB of vector memory that a kernel gets; compiled for v4, v5e, v5p and v6e.
_MULTIPLY_TILES = (512, 1024, 1024)
_OUTER_TILES = (512, 512, 1024)
# Rows of a tile come in multiples of the 16 sublanes of a packed bfloat16 register.
_ROW_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class Megablox:
  """See `moe_jax.moe.kernels.products.Kernels`; `interpret` runs anywhere, slowly, for tests."""

  interpret: bool = False

  def multiply(
    self, rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, transpose: bool
  ) -> jax.Array:
    """See `Kernels`."""
    out_dim = weights.shape[1 if transpose else 2]
    tiling = _tiling(_MULTIPLY_TILES, (*rows.shape, out_dim), rows.dtype)
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
    tiling = _tiling(_OUTER_TILES, (*rows.shape, others.shape[1]), rows.dtype)
    return tgmm(
      _whole_tiles(rows, tiling[0]).T,
      _whole_tiles(others, tiling[0]),
      group_sizes,
      dtype,
      tiling,
      interpret=self.interpret,
    )


def _tiling(
  largest: tuple[int, int, int], dims: tuple[int, int, int], dtype: jax.typing.DTypeLike
) -> tuple[int, int, int]:
  """Returns tiles no larger than the arrays; the kernels mask what overhangs, but not in rows."""
  fitting = (largest[0], 2 * largest[1] // jnp.dtype(dtype).itemsize, largest[2])
  rows, first, second = (min(tile, dim) for tile, dim in zip(fitting, dims, strict=True))
  return -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE, first, second


def _whole_tiles(rows: jax.Array, tile: int) -> jax.Array:
  """Pads rows with zeros to a multiple of the tile."""
  return jnp.pad(rows, ((0, -rows.shape[0] % tile), (0, 0)))
