"""How far two arrays are apart."""

import numpy as np


def relative_error(a, b):
  """Returns max|a - b| / max(max|b|, 1e-6), in float64; b is the judge."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  assert a.shape == b.shape, f"shapes {a.shape} and {b.shape} differ"
  return np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-6)
