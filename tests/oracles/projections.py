"""Make router logits of one token after the other, float64: x W, x W + b, and cosines."""

import math

import numpy as np

# Of the authors' code of Soft MoE (google-research/vmoe, projects/soft_moe/router.py).
EPSILON = 1e-6


def affine(x_SD, kernel_DE, bias_E):
  """Return x W + b (gpt-oss)."""
  return np.array(
    [
      [
        sum(a * b for a, b in zip(x_D, column, strict=True)) + bias
        for column, bias in zip(np.transpose(kernel_DE), bias_E, strict=True)
      ]
      for x_D in x_SD
    ]
  )


def normalized(x_SD, kernel_DE, scale):
  """Return the scaled cosine of token and column (Soft MoE, arXiv 2308.00951 section 2.3)."""
  columns = [unit(column) for column in np.transpose(kernel_DE)]
  rows = [[sum(unit(x_D) * column) for column in columns] for x_D in x_SD]
  return scale * np.array(rows)


def unit(vector):
  """Return the vector over its length."""
  return vector / math.sqrt(sum(value**2 for value in vector) + EPSILON)
