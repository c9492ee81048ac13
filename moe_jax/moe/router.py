"""The router's parameters: one linear map from token to expert logits, in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.parameters import parameter


class Router(nnx.Module):
  """Router logits x W in float32, matmul included, whatever the activations' dtype.

  `jitter` multiplies the router's input alone by uniform noise in [1 - jitter, 1 + jitter] in
  training (Switch, arXiv 2101.03961 section 2.4).
  """

  def __init__(
    self, model_dim: int, num_experts: int, *, key: jax.Array, scale: float, jitter: float = 0.0
  ):
    self.jitter = jitter
    self.kernel = parameter(
      key, (model_dim, num_experts), ("embed", "router"), fan_in=model_dim, scale=scale
    )

  def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
    """Maps x (B, L, D) to logits (B, L, E) float32; `key` turns the jitter on."""
    x = x.astype(jnp.float32)
    if self.jitter and key is not None:
      x = x * jax.random.uniform(key, x.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
    # The default float32 product on TPU runs bfloat16 passes.
    return jnp.matmul(x, self.kernel[...], precision=jax.lax.Precision.HIGHEST)
