"""Normalisation, in float32; the result is cast to the input's dtype before it is scaled."""

import enum

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.parameters import like, with_axes


class Norm(enum.StrEnum):
  """How activations are normalised over D."""

  RMSNORM = "rmsnorm"  # arXiv 1910.07467
  LAYERNORM = "layernorm"  # arXiv 1607.06450
  LAYERNORM_NO_BIAS = "layernorm_no_bias"


def root_mean_square_norm(x: jax.Array, epsilon: float) -> jax.Array:
  """Divides x (..., D) by its root mean square over D, in float32; keeps the dtype."""
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  return (x32 * jax.lax.rsqrt(mean_square + epsilon)).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Divides by the root mean square over D (arXiv 1910.07467), then scales, as LLaMA does."""

  def __init__(self, dim: int, epsilon: float = 1e-6):
    self.epsilon = epsilon
    self.scale = with_axes(jnp.ones((dim,), jnp.float32), ("norm",))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x (..., D)."""
    return root_mean_square_norm(x, self.epsilon) * like(self.scale[...], x)


class LayerNorm(nnx.Module):
  """Subtracts the mean over D and divides by the standard deviation (arXiv 1607.06450)."""

  def __init__(self, dim: int, epsilon: float, *, bias: bool):
    self.epsilon = epsilon
    self.scale = with_axes(jnp.ones((dim,), jnp.float32), ("norm",))
    if bias:
      self.bias = with_axes(jnp.zeros((dim,), jnp.float32), ("norm",))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x (..., D)."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = root_mean_square_norm(centred, self.epsilon).astype(x.dtype) * like(self.scale[...], x)
    return y + like(self.bias[...], x) if hasattr(self, "bias") else y


def make_norm(kind: Norm, dim: int, epsilon: float) -> RMSNorm | LayerNorm:
  """Returns the norm of that kind over `dim` features."""
  if kind == Norm.RMSNORM:
    return RMSNorm(dim, epsilon)
  return LayerNorm(dim, epsilon, bias=kind == Norm.LAYERNORM)
