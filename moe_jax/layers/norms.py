"""Normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.parameters import with_axes


class RMSNorm(nnx.Module):
  """Divides by the root mean square over D (arXiv 1910.07467), in float32, then scales.

  The result is cast to the input's dtype before the scale is applied, as LLaMA does.
  """

  def __init__(self, dim: int, epsilon: float = 1e-6):
    self.epsilon = epsilon
    self.scale = with_axes(jnp.ones((dim,), jnp.float32), ("norm",))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x (..., D)."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normed = (x32 * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
    scale = self.scale[...].astype(x.dtype)
    return normed * scale.reshape((1,) * (x.ndim - 1) + scale.shape)
