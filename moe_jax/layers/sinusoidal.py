"""Sinusoidal position embeddings, added to the tokens' (arXiv 1706.03762 section 3.5)."""

import math

import jax
import jax.numpy as jnp


def sinusoidal_embedding(positions: jax.Array, dim: int) -> jax.Array:
  """Returns (..., D) float32: D / 2 sines, then as many cosines.

  Frequencies fall from 1 to 1 / 10,000, both included, as in tensor2tensor and fairseq; the paper
  interleaves sines and cosines, and its last frequency stays above 1 / 10,000.

  Args:
    positions: (...) int32.
    dim: D, even and at least 4.
  """
  half = dim // 2
  frequencies = jnp.exp(-math.log(10_000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
  angles = jnp.multiply.outer(positions.astype(jnp.float32), frequencies)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
