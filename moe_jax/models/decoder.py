"""The decoder-only language model."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.layers.attention import cross_context
from moe_jax.layers.attention_context import Places
from moe_jax.layers.dropout import dropout, split_key
from moe_jax.layers.parameters import like, parameter, with_axes
from moe_jax.models.config import ModelConfig
from moe_jax.models.embedding import embed_tokens, make_embedding
from moe_jax.models.encoder import Encoded
from moe_jax.models.mixers import Context
from moe_jax.models.model_aux import ModelAux, make_aux
from moe_jax.models.multi_token import MultiTokenModule, look_ahead
from moe_jax.models.stack import CROSS, Record, SegmentCache, Stack
from moe_jax.models.vision import VisionTower, image_places, place_images
from moe_jax.moe.layer import NO_INPUTS, RouterInputs, TokenInfo
from moe_jax.sharding.context import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
  """What the mixers of all layers keep, and which cache slots hold real tokens.

  Attributes:
    segments: one `SegmentCache` a segment.
    token_mask: (B, M) bool over the M cache slots.
    index: int32 scalar, the next free slot.
    encoded_mask: (B, M') bool, the real tokens of an encoder's output; None without an encoder.
  """

  segments: list[SegmentCache]
  token_mask: jax.Array
  index: jax.Array
  encoded_mask: jax.Array | None = None


class Decoder(Stack):
  """Decoder of mixers and dense or expert feed-forwards.

  With `encoder` in its config it is the decoder of `moe_jax.models.EncoderDecoder`, and its blocks
  look at an encoder's output too. With `vision` it reads images: their tokens take the place of
  the embeddings of image tokens.
  """

  def __init__(self, config: ModelConfig, *, key: jax.Array):
    embed_key, stack_key, head_key = jax.random.split(key, 3)
    super().__init__(config, key=stack_key)
    D, V = config.model_dim, config.vocab_size
    self.embedding = make_embedding(config, embed_key)
    if not config.tie_embeddings:
      self.head = parameter(head_key, (D, V), ("embed", "vocab"), fan_in=D)
    if config.head_bias:
      self.head_bias = with_axes(jnp.zeros((V,), jnp.float32), ("bias",))
    if config.mtp_depth:
      keys = jax.random.split(jax.random.fold_in(key, 1), config.mtp_depth)
      self.mtp = nnx.List([MultiTokenModule(config, key=k) for k in keys])
    if config.vision is not None:
      self.vision = VisionTower(config, key=jax.random.fold_in(key, 2))

  def __call__(
    self,
    tokens: jax.Array,
    *,
    token_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    pixel_values: jax.Array | None = None,
    image_mask: jax.Array | None = None,
    encoded: Encoded | None = None,
    router_inputs: RouterInputs = NO_INPUTS,
    return_aux: bool = False,
    train: bool = False,
    key: jax.Array | None = None,
  ) -> jax.Array | tuple[jax.Array, ModelAux]:
    """Returns the logits of the next token at every position.

    Args:
      tokens: (B, L) int32.
      token_mask: (B, L) bool, True = real token; None = all real.
      segment_ids: (B, L) int32 of packed documents; mixers stay inside a segment.
      positions: (B, L) int32; None counts the real tokens of each row.
      pixel_values: (N, channels, rows, columns) floats, the images, or tiles of images, of all rows
        in order; None = no images, and image tokens have embeddings as all others.
      image_mask: (B, L) bool, the tokens that stand for images, `VisionConfig.tokens_per_image`
        each; None = the real ones with the id `VisionConfig.image_token`.
      encoded: an encoder's output, for models that have one.
      router_inputs: what single routers are given, see `RouterInputs`; a leading axis of MoE
        layers everywhere.
      return_aux: also return the routers' record.
      train: training capacity, dropout, jitter and random selection.
      key: random key for training, needed if the config draws random numbers.

    Returns:
      logits (B, L, V) float32, and `ModelAux` if asked for. A token id outside the
      vocabulary makes them NaN, also those of tokens that attend to it or share its experts. So
      does, inside a compiled function, another number of image tokens than the images have.

    Raises:
      UserError: shapes or dtypes that do not fit, another number of image tokens than the images
        have, or a missing key.
    """
    logits, records, further = self.logits_and_records(
      tokens,
      token_mask=token_mask,
      segment_ids=segment_ids,
      positions=positions,
      pixel_values=pixel_values,
      image_mask=image_mask,
      encoded=encoded,
      router_inputs=router_inputs,
      train=train,
      key=key,
      look_further=return_aux,
    )
    return (logits, make_aux(self.config, records, further)) if return_aux else logits

  def logits_and_records(
    self,
    tokens,
    *,
    token_mask,
    segment_ids,
    positions,
    encoded,
    router_inputs,
    train,
    key,
    pixel_values=None,
    image_mask=None,
    look_further=False,
  ) -> tuple[jax.Array, list[Record], list[jax.Array]]:
    """Returns logits, the records of blocks, and logits of further tokens; see `__call__`.

    Training with `mtp_depth` looks further if `look_further` says so; the records of those blocks
    come last.
    """
    check_tokens(tokens, token_mask, segment_ids, positions)
    self.check_key(train, key)
    self._check_router_inputs(router_inputs, train)
    if token_mask is None:
      token_mask = jnp.ones(tokens.shape, bool)
    if positions is None:
      positions = count_positions(token_mask)
    slots = jnp.arange(tokens.shape[1])
    places = Places(slots, positions, positions, token_mask, segment_ids)
    info = TokenInfo(token_mask, tokens, segment_ids)
    key = key if train else None
    contexts = self._contexts(places, encoded)
    x = self._embed_all(tokens, token_mask, positions, pixel_values, image_mask)
    x, _, records = self._run(x, info, contexts, None, inputs=router_inputs, key=key, train=train)
    further = []
    if look_further and train and self.config.mtp_depth:
      further, own = self._predict_further(x, info, places, contexts, router_inputs, key)
      records += own
    return self._logits(self.finish(x)), records, further

  def decode(
    self,
    tokens: jax.Array,
    cache: DecoderCache,
    *,
    token_mask: jax.Array | None = None,
    pixel_values: jax.Array | None = None,
  ) -> tuple[jax.Array, DecoderCache]:
    """Extends cached sequences by tokens (B, L) and returns their logits (B, L, V) and the cache.

    `pixel_values` are the images of these tokens, as in `__call__`.

    Padding (token_mask False) takes a cache slot but no position, and is never looked at. A cache
    without room for L more tokens is refused; inside a compiled function, where the free slots
    are not known, the logits are NaN. Routers that look at more than one token (expert choice,
    Soft MoE, drops, segments) see those of the call alone.

    Raises:
      UserError: shapes or dtypes that do not fit, a cache that is full or of another batch, or a
        router that reads the ids of earlier tokens.
    """
    check_tokens(tokens, token_mask)
    _check_room(tokens, cache)
    _check_ids_suffice(self.config)
    if token_mask is None:
      token_mask = jnp.ones(tokens.shape, bool)
    seen = jnp.sum(cache.token_mask, axis=1, keepdims=True)
    positions = seen + count_positions(token_mask)
    slots_mask = jax.lax.dynamic_update_slice_in_dim(
      cache.token_mask, token_mask, cache.index, axis=1
    )
    places = Places(
      cache.index + jnp.arange(tokens.shape[1]),
      positions,
      count_positions(slots_mask),
      slots_mask,
      cache_index=cache.index,
    )
    info = TokenInfo(token_mask, tokens)
    contexts = self.contexts(places)
    if cache.encoded_mask is not None:
      contexts[CROSS] = cross_context(None, _to_all(cache.encoded_mask, tokens.shape[1]))
    x = self._embed_all(tokens, token_mask, positions, pixel_values)
    x, segments, _ = self._run(
      x, info, contexts, cache.segments, inputs=NO_INPUTS, key=None, train=False
    )
    index = cache.index + tokens.shape[1]
    # An update beyond the last slot would silently overwrite earlier ones.
    x = jnp.where(index <= slots_mask.shape[1], x, jnp.nan)
    return self._logits(self.finish(x)), DecoderCache(
      segments, slots_mask, index, cache.encoded_mask
    )

  def init_cache(
    self, batch_size: int, num_slots: int, encoded: Encoded | None = None
  ) -> DecoderCache:
    """Returns a cache for `num_slots` tokens a row, prompt and new ones together.

    It is empty but for the keys and values of an encoder's output, which are made here, once.
    """
    self._check_encoded(encoded, batch_size)
    caches, mask = self.empty_caches(batch_size, num_slots), None
    if encoded is not None:
      mask = encoded.mask
      context = cross_context(encoded.hidden, _to_all(mask, 1))
      caches = self.with_encoded(caches, encoded.hidden, context)
    return DecoderCache(caches, jnp.zeros((batch_size, num_slots), bool), jnp.int32(0), mask)

  def _contexts(self, places: Places, encoded: Encoded | None) -> dict[str, Context]:
    self._check_encoded(encoded, places.query_positions.shape[0])
    if encoded is not None and encoded.segment_ids is not None and places.segment_ids is None:
      raise UserError(
        "the encoder's output is of packed sequences and segment_ids is None: give the segments of"
        " the decoder's tokens too"
      )
    contexts = self.contexts(places)
    if encoded is not None:
      mask = _to_all(encoded.mask, places.query_positions.shape[1])
      if encoded.segment_ids is not None:
        mask &= places.segment_ids[:, :, None] == encoded.segment_ids[:, None, :]
      contexts[CROSS] = cross_context(encoded.hidden, mask)
    return contexts

  def _run(self, x, tokens: TokenInfo, contexts, caches, *, inputs, key, train):
    embed_key, *keys = split_key(key, 1 + len(self.segments))
    x = dropout(x, self.config.dropout, embed_key)
    return self.run(x, contexts, tokens, caches, inputs=inputs, keys=keys, train=train)

  def embed(self, ids: jax.Array, mask: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the embeddings (B, L, D) of ids (B, L); see `embed_tokens`."""
    return embed_tokens(self.embedding[...], self.config, ids, mask, positions)

  def _embed_all(self, tokens, mask, positions, pixel_values, image_mask=None) -> jax.Array:
    """Returns the embeddings (B, L, D) of tokens, those of images from the tower."""
    x = self.embed(tokens, mask, positions)
    if pixel_values is None:
      if image_mask is not None:
        raise UserError("image_mask was given without pixel_values: give both, or neither")
      return x
    places = image_places(self.config, tokens, mask, pixel_values, image_mask)
    return place_images(x, places, self.vision(pixel_values))

  def _predict_further(self, x, tokens: TokenInfo, places: Places, contexts, inputs, key):
    """Returns the logits of every depth of multi-token prediction, and the experts' records."""
    keys = split_key(None if key is None else jax.random.fold_in(key, 1), len(self.mtp))
    logits, records = [], []
    layer = len(self.config.moe_layers())
    for depth, (module, module_key) in enumerate(zip(self.mtp, keys, strict=True), start=1):
      mine = slice(layer, layer := layer + module.segment.num_moe_layers)
      ids, info = look_ahead(tokens, depth)
      x, own = module(
        x,
        self.embed(ids, info.mask, places.query_positions + depth),
        contexts,
        info,
        inputs=jax.tree.map(lambda a, mine=mine: a[mine], inputs),
        key=module_key,
      )
      logits.append(self._logits(module.final_norm(x)))
      records.extend(own)
    return logits, records

  def _logits(self, x: jax.Array) -> jax.Array:
    head = self.embedding[...].T if self.config.tie_embeddings else self.head[...]
    head = constrain(head.astype(x.dtype), ("embed", "vocab"))
    logits = jnp.matmul(x, head, preferred_element_type=jnp.float32)
    if self.config.head_bias:
      logits += like(self.head_bias[...], logits)
    return constrain(logits, ("batch", "length", "vocab")) / self.config.logits_divisor

  def check_key(self, train: bool, key: jax.Array | None) -> None:
    """Refuses training without a key that the model needs."""
    if train and key is None and self.config.draws_numbers:
      raise UserError(
        "training this model draws random numbers: key = None was given, a jax.random.key is needed"
      )

  def _check_encoded(self, encoded: Encoded | None, rows: int) -> None:
    if (encoded is None) != (self.config.encoder is None):
      given = (
        "no encoder's output was given" if encoded is None else "an encoder's output was given"
      )
      has = "none" if self.config.encoder is None else "one"
      raise UserError(f"the model's config has {has} and {given}: expected both or neither")
    if encoded is not None and encoded.hidden.shape[0] != rows:
      raise UserError(
        f"the encoder's output has {encoded.hidden.shape[0]} rows; expected {rows}, those of the"
        " decoder's tokens"
      )

  def _check_router_inputs(self, inputs: RouterInputs, train: bool) -> None:
    further = train and self.config.mtp_depth
    stacks = [*self.segments, *([each.segment for each in self.mtp] if further else [])]
    check_router_inputs(inputs, sum(stack.num_moe_layers for stack in stacks))


def _to_all(mask_BM: jax.Array, length: int) -> jax.Array:
  """Returns (B, L, M): every query may look at what is real."""
  return jnp.broadcast_to(mask_BM[:, None, :], (mask_BM.shape[0], length, mask_BM.shape[1]))


def check_router_inputs(inputs: RouterInputs, layers: int) -> None:
  """Refuses inputs whose leading axis is not that of the MoE layers."""
  for name, value in vars(inputs).items():
    if value is not None and value.shape[:1] != (layers,):
      raise UserError(
        f"router_inputs.{name} has shape {value.shape}; expected a leading axis of {layers}, the"
        " number of MoE layers"
      )


def check_tokens(tokens, token_mask=None, segment_ids=None, positions=None) -> None:
  """Refuses tokens (B, L) and what comes with them where shapes or dtypes do not fit."""
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise UserError(
      f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; expected"
      " (batch, length) integers"
    )
  if token_mask is not None and (token_mask.shape != tokens.shape or token_mask.dtype != bool):
    raise UserError(
      f"token_mask has shape {token_mask.shape} and dtype {token_mask.dtype};"
      f" expected {tokens.shape} and bool, True = real token"
    )
  for name, value in (("segment_ids", segment_ids), ("positions", positions)):
    if value is not None and value.shape != tokens.shape:
      raise UserError(f"{name} has shape {value.shape}; expected that of tokens, {tokens.shape}")


def _check_room(tokens, cache: DecoderCache) -> None:
  (B, L), (rows, slots) = tokens.shape, cache.token_mask.shape
  if rows != B:
    raise UserError(f"the cache has {rows} rows; expected {B}, those of tokens")
  used = 0 if isinstance(cache.index, jax.core.Tracer) else int(cache.index)
  if used + L > slots:
    raise UserError(
      f"the cache has {slots} slots and {used} are taken: {L} more tokens need"
      f" init_cache with at least {used + L}"
    )


def _check_ids_suffice(config: ModelConfig) -> None:
  routing = config.moe.routing if config.moe else None
  if routing and routing.selection == "hash" and routing.hash_ngram > 1:
    raise UserError(
      f"hash_ngram = {routing.hash_ngram} reads ids before those of the call, which no cache keeps:"
      " call the model on whole sequences, or use hash_ngram = 1"
    )


def count_positions(token_mask: jax.Array) -> jax.Array:
  """Returns the positions (B, L) of tokens, counted in the real ones of each row."""
  return jnp.maximum(jnp.cumsum(token_mask, axis=1, dtype=jnp.int32) - 1, 0)
