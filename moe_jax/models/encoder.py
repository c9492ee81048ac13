"""The encoder of an encoder-decoder."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.layers.attention_context import Places
from moe_jax.layers.dropout import dropout, split_key
from moe_jax.models.config import ModelConfig
from moe_jax.models.embedding import make_embedding
from moe_jax.models.stack import Record, Stack
from moe_jax.moe.layer import RouterInputs, TokenInfo


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
  """An encoder's output.

  Attributes:
    hidden: (B, M, D).
    mask: (B, M) bool, True = real token.
    segment_ids: (B, M) int32 of packed sequences; None = every row is one.
  """

  hidden: jax.Array
  mask: jax.Array
  segment_ids: jax.Array | None = None


class Encoder(Stack):
  """A stack whose tokens see all tokens of their sequence.

  Attributes:
    embedding: (V, D), with `EncoderConfig.own_embedding`.
  """

  def __init__(self, config: ModelConfig, *, own_embedding: bool, key: jax.Array):
    super().__init__(config, key=key)
    if own_embedding:
      self.embedding = make_embedding(config, jax.random.fold_in(key, 1))

  def __call__(
    self,
    x: jax.Array,
    tokens: TokenInfo,
    positions: jax.Array,
    *,
    inputs: RouterInputs,
    key: jax.Array | None,
    train: bool,
  ) -> tuple[Encoded, list[Record]]:
    """Encodes embedded tokens x (B, M, D) at positions (B, M); returns the blocks' records too."""
    embed_key, out_key, *keys = split_key(key, 2 + len(self.segments))
    slots = jnp.arange(x.shape[1])
    places = Places(slots, positions, positions, tokens.mask, tokens.segment_ids, causal=False)
    x = dropout(x, self.config.dropout, embed_key)
    x, _, records = self.run(
      x, self.contexts(places), tokens, None, inputs=inputs, keys=keys, train=train
    )
    x = dropout(self.finish(x), self.config.dropout, out_key)
    return Encoded(x, tokens.mask, tokens.segment_ids), records
