"""The vision tower's own operations in NumPy float64, as loops over patches."""

import numpy as np


def patches(image, size):
  """Returns the patches (P, C * size^2) of one image (C, rows, columns)."""
  channels, rows, columns = image.shape
  found = []
  for top in range(0, rows, size):
    for left in range(0, columns, size):
      numbers = []
      for channel in range(channels):
        for row in range(top, top + size):
          numbers.extend(image[channel, row, left : left + size])
      found.append(numbers)
  return np.array(found)


def rotated(x, side, theta):
  """Turns x (side^2 + 1, H, K), patches row by row and the class token, as complex numbers."""
  out = np.array(x, np.float64)
  pairs = x.shape[-1] // 4
  for patch in range(side * side):
    row, column = divmod(patch, side)
    for pair in range(2 * pairs):
      place = column if pair < pairs else row
      angle = (place + 1) * theta ** (-(pair % pairs) / pairs)
      number = (x[patch, :, 2 * pair] + 1j * x[patch, :, 2 * pair + 1]) * np.exp(1j * angle)
      out[patch, :, 2 * pair], out[patch, :, 2 * pair + 1] = number.real, number.imag
  return out


def shuffled(x, size):
  """Returns squares of patches (P, W), side by side: (P / size^2, size^2 * W)."""
  side = int(len(x) ** 0.5)
  found = []
  for top in range(0, side, size):
    for left in range(0, side, size):
      square = [
        x[(top + down) * side + left + right] for down in range(size) for right in range(size)
      ]
      found.append(np.concatenate(square))
  return np.array(found)
