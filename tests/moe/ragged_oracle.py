"""The grouped products left to XLA: right everywhere, and E times the work where it is a loop."""

import jax
import jax.numpy as jnp


class RaggedDot:
  """`jax.lax.ragged_dot` and its automatic derivative, as kernels of a grouped product."""

  def multiply(self, rows, weights, group_sizes, *, transpose):
    weights = jnp.swapaxes(weights, 1, 2) if transpose else weights
    return jax.lax.ragged_dot(rows, weights, group_sizes)

  def outer(self, rows, others, group_sizes, dtype):
    def product(weights):
      return jax.lax.ragged_dot(rows.astype(jnp.float32), weights, group_sizes)

    shape = (group_sizes.size, rows.shape[1], others.shape[1])
    _, vjp = jax.vjp(product, jnp.zeros(shape, jnp.float32))
    return vjp(others.astype(jnp.float32))[0].astype(dtype)
