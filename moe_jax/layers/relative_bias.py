"""T5's relative position bias (arXiv 1910.10683 section 2.1)."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def relative_buckets(
  query_positions_BL: jax.Array,
  key_positions_BM: jax.Array,
  num_buckets: int,
  max_distance: int,
  *,
  causal: bool = True,
) -> jax.Array:
  """Returns the bucket of every distance between a query and a key, (B, L, M) int32.

  Of n buckets for looking back, distances below n // 2 have one each; beyond, buckets grow by a
  constant ratio up to max_distance, from which on all distances share the last. n is num_buckets
  for causal attention, where a key ahead of its query, which the mask hides, has the bucket of
  distance 0; else it is half of num_buckets, and the other half is for keys ahead.
  """
  distance = query_positions_BL[:, :, None] - key_positions_BM[:, None, :]
  if causal:
    return _one_way(distance, num_buckets, max_distance)
  side = num_buckets // 2
  return _one_way(jnp.abs(distance), side, max_distance) + jnp.where(distance < 0, side, 0)


def _one_way(distance: jax.Array, num_buckets: int, max_distance: int) -> jax.Array:
  bounds = jnp.asarray(_bucket_starts(num_buckets, max_distance))
  return jnp.searchsorted(bounds, distance, side="right").astype(jnp.int32)


def _bucket_starts(num_buckets: int, max_distance: int) -> np.ndarray:
  """Returns the least distance of every bucket but the first, (num_buckets - 1,) int32."""
  exact = num_buckets // 2
  ratio = math.log(max_distance / exact) / (num_buckets - exact)
  distances = np.arange(exact, max_distance + 1)
  steps = np.floor(np.log(distances / exact) / ratio + 1e-9).astype(int)
  buckets = np.minimum(exact + steps, num_buckets - 1)
  coarse = [distances[np.argmax(buckets >= b)] for b in range(exact + 1, num_buckets)]
  return np.array([*range(1, exact + 1), *coarse], np.int32)
