"""Random numbers for arrays on the host: NumPy's, which need no compilation for every shape."""

import jax
import numpy as np


def generator(key: jax.Array, *purpose: int) -> np.random.Generator:
  """Returns the generator of one purpose, a function of the key and these numbers."""
  words = np.asarray(jax.random.key_data(key)).ravel().tolist()
  return np.random.default_rng([*words, *purpose])
