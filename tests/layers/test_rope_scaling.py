"""Rope scaling where a release sets its bounds equal, and by lists of factors."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.layers.rope_scaling import RopeScaling
from moe_jax.layers.rotary import rotary_table


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


LONG = RopeScaling(
  "longrope", 4.0, original_max_position=16, short_factors=(1.0, 1.5), long_factors=(2.0, 8.0)
)


def test_longrope_takes_its_long_factors_in_rows_beyond_the_original_length():
  lengths, theta = [16, 17], 100.0
  positions = jnp.minimum(jnp.arange(17)[None], jnp.array(lengths)[:, None] - 1)
  for scaling, scales in (
    (LONG, [np.sqrt(1 + np.log(4) / np.log(16))] * 2),
    (dataclasses.replace(LONG, attention_factor=1.3), [1.3] * 2),
    (dataclasses.replace(LONG, short_mscale=1.2, long_mscale=1.5), [1.2, 1.5]),
  ):
    cos, sin = rotary_table(positions, 4, theta, scaling)
    for row, factors in enumerate((LONG.short_factors, LONG.long_factors)):
      angles = np.asarray(positions[row])[:, None] / (np.array([1.0, 10.0]) * factors)
      # Float32 of angles up to 16: steps of 1e-6.
      np.testing.assert_allclose(cos[row, :, 0], scales[row] * np.cos(angles), atol=3e-6)
      np.testing.assert_allclose(sin[row, :, 0], scales[row] * np.sin(angles), atol=3e-6)


def test_longrope_needs_a_factor_for_every_frequency():
  with pytest.raises(UserError, match="short_factors has 2 numbers, expected 4"):
    AttentionConfig(2, 2, 8, rope_scaling=LONG)
  with pytest.raises(UserError, match="long_factors = None is refused"):
    dataclasses.replace(LONG, long_factors=None)
  with pytest.raises(UserError, match="short_factors = .* would be ignored: kind = linear"):
    RopeScaling("linear", 2.0, short_factors=(1.0,))
