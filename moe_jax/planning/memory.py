"""Bytes of weights, optimizer state and cache, over all devices together."""

import jax.numpy as jnp

from moe_jax.models import ModelConfig
from moe_jax.planning.count import count_parameters
from moe_jax.planning.sizes import cache_width, router_state_size, state_bytes

# Of float32, and of the int32 of tables.
_WORD_BYTES = 4


def weight_bytes(config: ModelConfig) -> int:
  """Returns the bytes of the parameters, float32 as training keeps them.

  Router state and the modules of multi-token prediction are included.
  """
  state = 0
  if config.moe is not None:
    layers = len(config.moe_layers(train=True))
    state = layers * router_state_size(config.vocab_size, config.moe)
  return _WORD_BYTES * (_all_parameters(config) + state)


def optimizer_bytes(config: ModelConfig) -> int:
  """Returns the bytes of AdamW's two moments, float32; its step counters are left out."""
  return 2 * _WORD_BYTES * _all_parameters(config)


def cache_bytes_per_token(config: ModelConfig) -> int:
  """Returns the bytes that decoding keeps of one token it writes, in the dtype of activations.

  A window or chunk does not shorten the cache, which has a slot for every token. What says which
  slots are real (one byte a slot, one more in a block that takes only some tokens) is left out.
  Mamba layers keep nothing of a token, see `cache_bytes_per_sequence`.
  """
  mixers = config.mixers()
  words = [block[0] for block in config.layers() if block[0] != "mamba"]
  numbers = sum(cache_width(mixers[word]) for word in words)
  return numbers * jnp.dtype(config.dtype).itemsize


def encoded_cache_bytes_per_token(config: ModelConfig) -> int:
  """Returns the bytes that decoding keeps of one token of an encoder; 0 without one."""
  if config.encoder is None:
    return 0
  numbers = len(config.layers()) * cache_width(config.cross_attention)
  return numbers * jnp.dtype(config.dtype).itemsize


def cache_bytes_per_sequence(config: ModelConfig) -> int:
  """Returns the bytes that decoding keeps of a sequence whatever its length: Mamba's states."""
  layers = sum(block[0] == "mamba" for block in config.layers())
  return layers * state_bytes(config.mamba, jnp.dtype(config.dtype).itemsize) if layers else 0


def _all_parameters(config: ModelConfig) -> int:
  count = count_parameters(config)
  return count.total + count.multi_token.total
