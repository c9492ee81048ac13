"""Padded prompts continue as alone through every kind of cache: latent, chunked and windowed."""

import numpy as np
import pytest
from layers.attention_layers import latent_config
from tiny_models import random_model, random_tokens, tiny_config

from moe_jax import generate
from moe_jax.layers.attention_config import AttentionConfig

CONFIG = tiny_config(
  segments=(("latent_attention:moe", 1), ("attention:dense global_attention:moe", 1)),
  attention=AttentionConfig(4, 2, 4, rope_theta=100.0, chunk=3),
  global_attention=AttentionConfig(4, 2, 4, rope_theta=100.0, window=3),
  latent_attention=latent_config(),
)
# A model that does not repeat itself.
MODEL = random_model(CONFIG, 9)
LENGTH, NEW = 5, 2
PROMPTS = random_tokens(CONFIG, 2, LENGTH)


@pytest.fixture(scope="module")
def alone():
  new = np.asarray(generate(MODEL, PROMPTS, NEW))[:, LENGTH:]
  assert all(len(set(row)) > 1 for row in new.tolist())
  return new


@pytest.mark.parametrize("use_cache", [True, False])
def test_left_and_right_padded_prompts_continue_as_unpadded_ones(use_cache, alone):
  width = 2
  tokens = np.full((4, LENGTH + width), 11, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, (prompt, start) in enumerate([(0, 0), (0, width), (1, 0), (1, width)]):
    place = slice(start, start + LENGTH)
    tokens[row, place], mask[row, place] = PROMPTS[prompt], True
  padded = generate(MODEL, tokens, NEW, token_mask=mask, use_cache=use_cache)
  np.testing.assert_array_equal(padded[:, LENGTH + width :], alone[[0, 0, 1, 1]])
