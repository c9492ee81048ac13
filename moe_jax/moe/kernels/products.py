"""The product of grouped rows with their experts' weights, over kernels that have no derivative."""

import functools
from typing import Protocol

import jax


class Kernels(Protocol):
  """Two kernels, which are each other's derivatives. Hashable: one value, one program.

  Group e are the `group_sizes[e]` rows behind those of the groups before it. Both products
  accumulate in float32 and never read a row beyond the groups into a result.
  """

  def multiply(
    self, rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, *, transpose: bool
  ) -> jax.Array:
    """Returns (R, F): rows (R, D) times weights[e] (D, F), or (F, D) if `transpose`.

    Rows beyond the groups are zeros; the result has the dtype of `rows`.
    """

  def outer(
    self, rows: jax.Array, others: jax.Array, group_sizes: jax.Array, dtype: jax.typing.DTypeLike
  ) -> jax.Array:
    """Returns (E, D, F): rows (R, D), transposed, times others (R, F), for each group.

    A group without rows gets zeros.
    """


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_dot(
  kernels: Kernels, rows: jax.Array, weights: jax.Array, group_sizes: jax.Array
) -> jax.Array:
  """Multiplies each group of rows by its own weights, with a derivative in both.

  Args:
    kernels: the two products.
    rows: (R, D), sorted by group.
    weights: (E, D, F), in the dtype of `rows`.
    group_sizes: (E,) int32, sums to at most R.

  Returns:
    (R, F) in the dtype of `rows`; zeros beyond the groups.
  """
  return kernels.multiply(rows, weights, group_sizes, transpose=False)


def _save(kernels, rows, weights, group_sizes):
  return grouped_dot(kernels, rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(kernels, saved, dout):
  rows, weights, group_sizes = saved
  drows = kernels.multiply(dout, weights, group_sizes, transpose=True)
  return drows, kernels.outer(rows, dout, group_sizes, weights.dtype), None


grouped_dot.defvjp(_save, _backward)
