"""Check a gradient by central finite differences in float64."""

import numpy as np


def gradient(function, x, *, step=1e-5):
  """Return d function(x) / dx by central differences.

  Args:
    function: maps an array of x's shape to a number, or to a vector (n,); it must not keep or
      change its argument.
    x: float64 array.
    step: half the distance between the two evaluations. Truncation is about step^2 and rounding
      about 1e-16 / step, so 1e-5 leaves errors near 1e-10 for values around 1.

  Returns:
    An array of x's shape; with a vector (*x.shape, n).
  """
  x = np.array(x, np.float64)
  result = np.zeros(x.shape + np.shape(function(x.copy())))
  for index in np.ndindex(x.shape):
    above, below = x.copy(), x.copy()
    above[index] += step
    below[index] -= step
    result[index] = (function(above) - function(below)) / (2.0 * step)
  return result
