"""The decoder-only language model."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.layers.attention_context import Places
from moe_jax.layers.dropout import dropout, split_key
from moe_jax.layers.norms import make_norm
from moe_jax.layers.parameters import like, parameter, with_axes
from moe_jax.models.config import DEPTH, ModelConfig
from moe_jax.models.depths import DepthAux, DepthCache
from moe_jax.models.mixers import empty_cache, mixer_contexts
from moe_jax.models.multi_token import MultiTokenModule, look_ahead
from moe_jax.models.stack import ScannedSegment, SegmentCache
from moe_jax.moe.layer import NO_INPUTS, RouterInputs, TokenInfo
from moe_jax.moe.plan import DensePlan, RoutingPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelAux:
  """What the routers decided, one entry a MoE layer in order of `ModelConfig.moe_layers`.

  Attributes:
    router_logits: list of (B, L, E) float32.
    plans: list of `RoutingPlan` (or `DensePlan`).
    losses: float32 means over layers by name, without coefficients, see `moe_jax.moe.losses`, and
      `depth` of the depth blocks.
    weighted_loss: float32 scalar, the sum over layers of coefficient * loss: the term added to the
      objective (Switch, arXiv 2101.03961 section 2.2: "for each Switch layer"). Some code bases
      take the mean over layers instead: divide the coefficients by the number of MoE layers.
    metrics: float32 means over layers; per layer see `plans[i].metrics`.
    depths: list of `DepthAux`, one a depth block in order.
    mtp_logits: list of (B, L, V) float32, in training one for each depth k = 1, 2, ... of
      multi-token prediction: of the token k + 1 places on.
  """

  router_logits: list[jax.Array]
  plans: list[RoutingPlan | DensePlan]
  losses: dict[str, jax.Array]
  weighted_loss: jax.Array
  metrics: dict[str, jax.Array]
  depths: list[DepthAux]
  mtp_logits: list[jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderCache:
  """What the mixers of all layers keep, and which cache slots hold real tokens.

  Attributes:
    segments: one `SegmentCache` a segment.
    token_mask: (B, M) bool over the M cache slots.
    index: int32 scalar, the next free slot.
  """

  segments: list[SegmentCache]
  token_mask: jax.Array
  index: jax.Array


class Decoder(nnx.Module):
  """Pre-norm decoder of mixers and dense or expert feed-forwards."""

  def __init__(self, config: ModelConfig, *, key: jax.Array):
    embed_key, stack_key, head_key = jax.random.split(key, 3)
    self.config = config
    D, V = config.model_dim, config.vocab_size
    # Unit variance after the first norm whatever the scale; 1/sqrt(D) keeps a tied head's logits
    # of order one.
    self.embedding = parameter(embed_key, (V, D), ("vocab", "embed"), fan_in=D)
    segments = config.parsed_segments()
    keys = jax.random.split(stack_key, len(segments))
    self.segments = nnx.List(
      [ScannedSegment(config, s, key=k) for s, k in zip(segments, keys, strict=True)]
    )
    self.final_norm = make_norm(config.norm, D, config.norm_epsilon)
    if not config.tie_embeddings:
      self.head = parameter(head_key, (D, V), ("embed", "vocab"), fan_in=D)
    if config.head_bias:
      self.head_bias = with_axes(jnp.zeros((V,), jnp.float32), ("bias",))
    if config.mtp_depth:
      keys = jax.random.split(jax.random.fold_in(key, 1), config.mtp_depth)
      self.mtp = nnx.List([MultiTokenModule(config, key=k) for k in keys])

  def __call__(
    self,
    tokens: jax.Array,
    *,
    token_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
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
      router_inputs: what single routers are given, see `RouterInputs`; a leading axis of MoE
        layers everywhere.
      return_aux: also return the routers' record.
      train: training capacity, dropout, jitter and random selection.
      key: random key for training, needed if the config draws random numbers.

    Returns:
      logits (B, L, V) float32, and `ModelAux` if asked for. A token id outside the
      vocabulary makes them NaN, also those of tokens that attend to it or share its experts.

    Raises:
      UserError: shapes or dtypes that do not fit, or a missing key.
    """
    _check_tokens(tokens, token_mask, segment_ids, positions)
    self._check_key(train, key)
    self._check_router_inputs(router_inputs, train)
    if token_mask is None:
      token_mask = jnp.ones(tokens.shape, bool)
    if positions is None:
      positions = _count_positions(token_mask)
    slots = jnp.arange(tokens.shape[1])
    places = Places(slots, positions, positions, token_mask, segment_ids)
    info = TokenInfo(token_mask, tokens, segment_ids)
    key = key if train else None
    x, _, records = self._run(info, places, None, inputs=router_inputs, key=key, train=train)
    logits = self._logits(x, self.final_norm)
    if not return_aux:
      return logits
    further = []
    if train and self.config.mtp_depth:
      further, own = self._predict_further(x, info, places, router_inputs, key)
      records += own
    return logits, self._aux(records, further)

  def decode(
    self, tokens: jax.Array, cache: DecoderCache, *, token_mask: jax.Array | None = None
  ) -> tuple[jax.Array, DecoderCache]:
    """Extends cached sequences by tokens (B, L) and returns their logits (B, L, V) and the cache.

    Padding (token_mask False) takes a cache slot but no position, and is never looked at. A cache
    without room for L more tokens is refused; inside a compiled function, where the free slots
    are not known, the logits are NaN. Routers that look at more than one token (expert choice,
    Soft MoE, drops, segments) see those of the call alone.

    Raises:
      UserError: shapes or dtypes that do not fit, a cache that is full or of another batch, or a
        router that reads the ids of earlier tokens.
    """
    _check_tokens(tokens, token_mask)
    _check_room(tokens, cache)
    _check_ids_suffice(self.config)
    if token_mask is None:
      token_mask = jnp.ones(tokens.shape, bool)
    seen = jnp.sum(cache.token_mask, axis=1, keepdims=True)
    positions = seen + _count_positions(token_mask)
    slots_mask = jax.lax.dynamic_update_slice_in_dim(
      cache.token_mask, token_mask, cache.index, axis=1
    )
    places = Places(
      cache.index + jnp.arange(tokens.shape[1]),
      positions,
      _count_positions(slots_mask),
      slots_mask,
      cache_index=cache.index,
    )
    info = TokenInfo(token_mask, tokens)
    x, segments, _ = self._run(
      info, places, cache.segments, inputs=NO_INPUTS, key=None, train=False
    )
    index = cache.index + tokens.shape[1]
    # An update beyond the last slot would silently overwrite earlier ones.
    x = jnp.where(index <= slots_mask.shape[1], x, jnp.nan)
    return self._logits(x, self.final_norm), DecoderCache(segments, slots_mask, index)

  def init_cache(self, batch_size: int, num_slots: int) -> DecoderCache:
    """Returns an empty cache for `num_slots` tokens a row, prompt and new ones together."""

    def empty(repeats, block):
      slots = (repeats, batch_size, num_slots)
      cache = empty_cache(self.config, block[0], slots)
      return DepthCache(cache, jnp.zeros(slots, bool)) if DEPTH in block else cache

    segments = [
      tuple(empty(s.repeats, block) for block in s.pattern) for s in self.config.parsed_segments()
    ]
    return DecoderCache(segments, jnp.zeros((batch_size, num_slots), bool), jnp.int32(0))

  def _run(self, tokens: TokenInfo, places: Places, caches, *, inputs, key, train):
    embed_key, *keys = split_key(key, 1 + len(self.segments))
    x = dropout(self._embed(tokens.ids, tokens.mask), self.config.dropout, embed_key)
    contexts = mixer_contexts(self.config, places)
    caches = [None] * len(self.segments) if caches is None else caches
    new_caches, records, layer = [], [], 0
    for segment, cache, segment_key in zip(self.segments, caches, keys, strict=True):
      mine = slice(layer, layer := layer + segment.num_moe_layers)
      own = jax.tree.map(lambda a, mine=mine: a[mine], inputs)
      x, cache, aux = segment(x, contexts, tokens, cache, inputs=own, key=segment_key, train=train)
      new_caches.append(cache)
      records.extend(aux)
    return x, new_caches, records

  def _embed(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    # An id outside the vocabulary must not pass for a word; what padding holds does not matter.
    ids = jnp.where(mask, ids, 0)
    x = (
      self.embedding[...]
      .at[ids]
      .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
      .astype(self.config.dtype)
    )
    return x * self.config.embedding_multiplier

  def _predict_further(self, x, tokens: TokenInfo, places: Places, inputs, key):
    """Returns the logits of every depth of multi-token prediction, and the experts' records."""
    contexts = mixer_contexts(self.config, places)
    keys = split_key(None if key is None else jax.random.fold_in(key, 1), len(self.mtp))
    logits, records = [], []
    layer = len(self.config.moe_layers())
    for depth, (module, module_key) in enumerate(zip(self.mtp, keys, strict=True), start=1):
      mine = slice(layer, layer := layer + module.segment.num_moe_layers)
      ids, info = look_ahead(tokens, depth)
      x, own = module(
        x,
        self._embed(ids, info.mask),
        contexts,
        info,
        inputs=jax.tree.map(lambda a, mine=mine: a[mine], inputs),
        key=module_key,
      )
      logits.append(self._logits(x, module.final_norm))
      records.extend(own)
    return logits, records

  def _logits(self, x: jax.Array, norm) -> jax.Array:
    x = norm(x)
    head = self.embedding[...].T if self.config.tie_embeddings else self.head[...]
    logits = jnp.matmul(x, head.astype(x.dtype), preferred_element_type=jnp.float32)
    if self.config.head_bias:
      logits += like(self.head_bias[...], logits)
    return logits / self.config.logits_divisor

  def _aux(self, records, mtp_logits) -> ModelAux:
    depths = [record for record in records if isinstance(record, DepthAux)]
    records = [record.moe if isinstance(record, DepthAux) else record for record in records]
    records = [record for record in records if record is not None]
    plans = [record.plan for record in records]
    losses = _mean([plan.losses for plan in plans])
    metrics = _mean([plan.metrics for plan in plans])
    weighted = sum((record.weighted_loss for record in records), jnp.float32(0.0))
    if depths:
      losses |= _mean([{"depth": each.loss} for each in depths])
      metrics |= _mean([{f"depth_{n}": m for n, m in d.metrics.items()} for d in depths])
      weighted += self.config.depth.loss_weight * sum(each.loss for each in depths)
    logits = [record.router_logits for record in records]
    return ModelAux(logits, plans, losses, weighted, metrics, depths, mtp_logits)

  def _check_key(self, train, key) -> None:
    c = self.config
    draws = c.dropout or (c.mlp and c.mlp.dropout) or (c.moe and c.moe.needs_key)
    if train and key is None and draws:
      raise UserError(
        "training this model draws random numbers: key = None was given, a jax.random.key is needed"
      )

  def _check_router_inputs(self, inputs: RouterInputs, train: bool) -> None:
    layers = len(self.config.moe_layers(train=train))
    for name, value in vars(inputs).items():
      if value is not None and value.shape[:1] != (layers,):
        raise UserError(
          f"router_inputs.{name} has shape {value.shape}; expected a leading axis of {layers}, the"
          " number of MoE layers"
        )


def _mean(layers: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
  """Returns the mean over layers of each entry; nothing without layers."""
  names = layers[0] if layers else ()
  return {name: sum(layer[name] for layer in layers) / len(layers) for name in names}


def _check_tokens(tokens, token_mask=None, segment_ids=None, positions=None) -> None:
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


def _count_positions(token_mask: jax.Array) -> jax.Array:
  return jnp.maximum(jnp.cumsum(token_mask, axis=1, dtype=jnp.int32) - 1, 0)
