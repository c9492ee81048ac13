"""The random numbers that `selection = sparsemixer` draws from a key, for the oracle."""

import jax
import numpy as np


def sparsemixer_draws(key, shape, top_k):
  """Returns Gumbel numbers (K, G, S, E) and uniform ones (K, G, S) of logits of that shape."""
  gumbel, uniform = [], []
  for pick_key in jax.random.split(key, top_k):
    sample_key, heun_key = jax.random.split(pick_key)
    gumbel.append(jax.random.gumbel(sample_key, shape))
    uniform.append(jax.random.uniform(heun_key, shape[:2]))
  return np.array(gumbel, np.float64), np.array(uniform, np.float64)
