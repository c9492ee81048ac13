"""Rotary position embedding (RoFormer, arXiv 2104.09864 Eq. 34)."""

import jax
import jax.numpy as jnp

from moe_jax.layers.attention_config import RotaryLayout
from moe_jax.layers.rope_scaling import RopeScaling

# Cosine and sine, each (B, L, 1, K / 2) float32 for K rotated dimensions.
RotaryTable = tuple[jax.Array, jax.Array]


def rotary_table(
  positions_BL: jax.Array, rotary_dim: int, theta: float, scaling: RopeScaling | None = None
) -> RotaryTable:
  """Returns cosine and sine of position * theta^(-2i / K), K = `rotary_dim`, in float32."""
  half = rotary_dim // 2
  frequency = (theta ** (-jnp.arange(half, dtype=jnp.float32) / half)).reshape(1, 1, 1, half)
  factor = 1.0
  if scaling is not None:
    factors, factor = _scaled(scaling, positions_BL, rotary_dim, theta)
    frequency = frequency * factors
  angle = positions_BL[..., None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return (cos, sin) if isinstance(factor, float) and factor == 1.0 else (cos * factor, sin * factor)


def _scaled(scaling: RopeScaling, positions_BL: jax.Array, rotary_dim: int, theta: float):
  """Returns what frequencies, (B or 1, 1, 1, K / 2), and tables, a number or (B, 1, 1, 1), take."""
  within, beyond = (
    each.frequency_factors(rotary_dim, theta).astype(jnp.float32).reshape(1, 1, 1, -1)
    for each in (scaling, scaling.beyond)
  )
  if scaling.beyond == scaling:
    return within, scaling.table_factor
  is_beyond = (jnp.max(positions_BL, axis=1) >= scaling.original_max_position)[:, None, None, None]
  factor = jnp.where(is_beyond, scaling.beyond.table_factor, scaling.table_factor)
  return jnp.where(is_beyond, beyond, within), factor


def apply_rotary(
  x_BLHK: jax.Array, table: RotaryTable, layout: RotaryLayout = RotaryLayout.HALVES
) -> jax.Array:
  """Rotates each head (B, L, H, K) of queries or keys by its position; keeps the dtype.

  A table of fewer dimensions than K rotates the first ones and lets the others pass.
  """
  cos, sin = table
  rotary_dim = 2 * cos.shape[-1]
  x, rest = x_BLHK[..., :rotary_dim], x_BLHK[..., rotary_dim:]
  a, b = _parts(x.astype(jnp.float32), layout)
  rotated = _join(a * cos - b * sin, b * cos + a * sin, layout).astype(x.dtype)
  return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def _parts(x: jax.Array, layout: RotaryLayout) -> list[jax.Array]:
  if layout == RotaryLayout.HALVES:
    return jnp.split(x, 2, axis=-1)
  return [x[..., 0::2], x[..., 1::2]]


def _join(a: jax.Array, b: jax.Array, layout: RotaryLayout) -> jax.Array:
  if layout == RotaryLayout.HALVES:
    return jnp.concatenate([a, b], axis=-1)
  return jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], -1)
