"""Rotary position embedding."""

import jax
import jax.numpy as jnp


def apply_rotary(x_BLHK: jax.Array, positions_BL: jax.Array, theta: float) -> jax.Array:
  """Rotates each head by its position (RoFormer, arXiv 2104.09864 Eq. 34), halves layout.

  Args:
    x_BLHK: (B, L, H, K) queries or keys, K the head width, even.
    positions_BL: (B, L) int32.
    theta: base of the frequencies theta^(-2i/K).

  Returns:
    (B, L, H, K) in the dtype of x; angles are float32.
  """
  half = x_BLHK.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions_BL[..., None, None].astype(jnp.float32) * frequency.reshape(1, 1, 1, half)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHK.dtype)
