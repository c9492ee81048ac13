"""Rotary position embedding (RoFormer, arXiv 2104.09864 Eq. 34), halves layout."""

import jax
import jax.numpy as jnp

# Cosine and sine, each (B, L, 1, K / 2) float32.
RotaryTable = tuple[jax.Array, jax.Array]


def rotary_table(positions_BL: jax.Array, head_dim: int, theta: float) -> RotaryTable:
  """Returns cosine and sine of position * theta^(-2i / K), K = `head_dim`, in float32."""
  half = head_dim // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions_BL[..., None, None].astype(jnp.float32) * frequency.reshape(1, 1, 1, half)
  return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(x_BLHK: jax.Array, table: RotaryTable) -> jax.Array:
  """Rotates each head (B, L, H, K) of queries or keys by its position; keeps the dtype.

  Dimension i is paired with i + K / 2, as in LLaMA's released code; RoFormer pairs neighbours.
  """
  cos, sin = table
  a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BLHK.dtype)
