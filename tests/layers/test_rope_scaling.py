"""Rope scaling where a release sets its bounds equal."""

import numpy as np

from moe_jax.layers.rope_scaling import RopeScaling


def test_equal_bounds_scale_long_wavelengths_whole_and_others_not():
  # Llama 4 Scout: wavelengths of more than 8,192 positions become 16 times longer.
  scaling = RopeScaling(
    "llama3", 16.0, original_max_position=8192, low_freq_factor=1.0, high_freq_factor=1.0
  )
  theta, width = 500_000.0, 128
  wavelengths = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
  expected = np.where(wavelengths > 8192, 1 / 16, 1.0)
  assert 0 < np.sum(expected == 1) < expected.size
  np.testing.assert_array_equal(scaling.frequency_factors(width, theta), expected)
