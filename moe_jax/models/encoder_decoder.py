"""The encoder-decoder language model."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.layers.dropout import split_key
from moe_jax.models.config import ModelConfig
from moe_jax.models.decoder import (
  Decoder,
  DecoderCache,
  check_router_inputs,
  check_tokens,
  count_positions,
)
from moe_jax.models.embedding import embed_tokens
from moe_jax.models.encoder import Encoded, Encoder
from moe_jax.models.model_aux import ModelAux, make_aux
from moe_jax.moe.layer import NO_INPUTS, RouterInputs, TokenInfo


class EncoderDecoder(nnx.Module):
  """An encoder, and a decoder whose blocks look at its output.

  Both share the embedding, unless `EncoderConfig.own_embedding` says otherwise.

  Attributes:
    encoder: of `ModelConfig.encoder_stack`.
    decoder: of the config itself.
  """

  def __init__(self, config: ModelConfig, *, key: jax.Array):
    encoder_key, decoder_key = jax.random.split(key)
    self.config = config
    own_embedding = config.encoder.own_embedding
    self.encoder = Encoder(config.encoder_stack(), own_embedding=own_embedding, key=encoder_key)
    self.decoder = Decoder(config, key=decoder_key)

  def __call__(
    self,
    tokens: jax.Array,
    decoder_tokens: jax.Array,
    *,
    token_mask: jax.Array | None = None,
    decoder_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    decoder_segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    decoder_positions: jax.Array | None = None,
    router_inputs: RouterInputs = NO_INPUTS,
    return_aux: bool = False,
    train: bool = False,
    key: jax.Array | None = None,
  ) -> jax.Array | tuple[jax.Array, ModelAux]:
    """Returns the logits of the decoder's next token at each of its positions.

    Args:
      tokens: (B, M) int32, what is encoded.
      decoder_tokens: (B, L) int32, beginning with `EncoderConfig.start_token`.
      token_mask, decoder_mask: (B, M) and (B, L) bool, True = real token; None = all real.
      segment_ids, decoder_segment_ids: (B, M) and (B, L) int32 of packed sequences, both or
        neither; a segment of the decoder looks at the encoder's of the same id.
      positions, decoder_positions: (B, M) and (B, L) int32; None counts the real tokens.
      router_inputs, return_aux, train, key: see `Decoder`; the encoder's layers come first.

    Returns:
      logits (B, L, V) float32, and `ModelAux` if asked for.

    Raises:
      UserError: shapes or dtypes that do not fit, or a missing key.
    """
    if (segment_ids is None) != (decoder_segment_ids is None):
      raise UserError("segment_ids and decoder_segment_ids belong together: give both, or neither")
    check_router_inputs(router_inputs, len(self.config.moe_layers()))
    encoder_key, decoder_key = split_key(key if train else None, 2)
    own, theirs = self._split_inputs(router_inputs)
    encoded, records = self._encode(
      tokens, token_mask, segment_ids, positions, inputs=own, key=encoder_key, train=train
    )
    logits, more, _ = self.decoder.logits_and_records(
      decoder_tokens,
      token_mask=decoder_mask,
      segment_ids=decoder_segment_ids,
      positions=decoder_positions,
      encoded=encoded,
      router_inputs=theirs,
      train=train,
      key=decoder_key,
    )
    if not return_aux:
      return logits
    return logits, make_aux(self.config, records + more)

  def encode(self, tokens: jax.Array, *, token_mask: jax.Array | None = None) -> Encoded:
    """Returns the encoder's output for tokens (B, M), as outside training."""
    own, _ = self._split_inputs(NO_INPUTS)
    return self._encode(tokens, token_mask, None, None, inputs=own, key=None, train=False)[0]

  def init_cache(self, encoded: Encoded, num_slots: int) -> DecoderCache:
    """Returns the decoder's cache for `num_slots` tokens a row behind an encoder's output."""
    return self.decoder.init_cache(encoded.hidden.shape[0], num_slots, encoded)

  def decode(
    self, tokens: jax.Array, cache: DecoderCache, *, token_mask: jax.Array | None = None
  ) -> tuple[jax.Array, DecoderCache]:
    """Extends the decoder's sequences by tokens (B, L); see `Decoder.decode`."""
    return self.decoder.decode(tokens, cache, token_mask=token_mask)

  def _encode(self, tokens, token_mask, segment_ids, positions, *, inputs, key, train):
    check_tokens(tokens, token_mask, segment_ids, positions)
    self.decoder.check_key(train, key)
    token_mask = jnp.ones(tokens.shape, bool) if token_mask is None else token_mask
    positions = count_positions(token_mask) if positions is None else positions
    table = (self.encoder if self.config.encoder.own_embedding else self.decoder).embedding
    x = embed_tokens(table[...], self.config, tokens, token_mask, positions)
    info = TokenInfo(token_mask, tokens, segment_ids)
    return self.encoder(x, info, positions, inputs=inputs, key=key, train=train)

  def _split_inputs(self, inputs: RouterInputs) -> tuple[RouterInputs, RouterInputs]:
    """Returns what the encoder's routers are given, and what the decoder's are."""
    count = sum(segment.num_moe_layers for segment in self.encoder.segments)
    return tuple(
      jax.tree.map(lambda a, part=part: a[part], inputs)
      for part in (slice(0, count), slice(count, None))
    )
