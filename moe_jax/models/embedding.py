"""Tokens to vectors."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.parameters import parameter
from moe_jax.layers.sinusoidal import sinusoidal_embedding
from moe_jax.models.config import ModelConfig, PositionEmbedding
from moe_jax.sharding.context import constrain
from moe_jax.sharding.local import look_up_rows


def make_embedding(config: ModelConfig, key: jax.Array) -> nnx.Param:
  """Returns a new table (V, D).

  Unit variance after the first norm whatever the scale; 1/sqrt(D) keeps a tied head's logits of
  order one.
  """
  shape = (config.vocab_size, config.model_dim)
  return parameter(key, shape, ("vocab", "embed"), fan_in=config.model_dim)


def embed_tokens(
  table: jax.Array, config: ModelConfig, ids: jax.Array, mask: jax.Array, positions: jax.Array
) -> jax.Array:
  """Returns the embeddings (B, L, D) in the model's dtype, with what tells their places.

  Args:
    table: (V, D).
    config: the model's.
    ids: (B, L) int32; one outside the vocabulary has an embedding of NaN.
    mask: (B, L) bool, True = real token; what padding holds does not matter.
    positions: (B, L) int32.
  """
  # An id outside the vocabulary must not pass for a word.
  ids = jnp.where(mask, ids, 0)
  x = look_up_rows(table, ids).astype(config.dtype) * config.embedding_multiplier
  if config.position_embedding == PositionEmbedding.SINUSOIDAL:
    places = sinusoidal_embedding(positions + config.position_offset, config.model_dim)
    x = x + places.astype(x.dtype)
  return constrain(x, ("batch", "length", None))
