"""Dropout as a function of an explicit key, so that a step is a function of its number alone."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes entries with probability `rate` and scales the rest; the identity without a key."""
  if rate == 0.0 or key is None:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
  """Splits a key into `count`, or returns that many None outside training."""
  return [None] * count if key is None else list(jax.random.split(key, count))
