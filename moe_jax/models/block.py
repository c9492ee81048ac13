"""One block: a mixer and a feed-forward, each behind a norm and a residual."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.attention import Attention, KVCache
from moe_jax.layers.attention_context import AttentionContext
from moe_jax.layers.dropout import dropout, split_key
from moe_jax.layers.mlp import FeedForward
from moe_jax.layers.norms import make_norm
from moe_jax.models.config import ModelConfig, NormPlacement
from moe_jax.models.mixers import Cache, Context, make_mixer
from moe_jax.moe.layer import NO_INPUTS, MoEAux, MoELayer, RouterInputs, TokenInfo


def _dense(config: ModelConfig, key: jax.Array) -> FeedForward:
  return FeedForward(config.model_dim, config.mlp, key=key, scale=config.init_scale)


def _experts(config: ModelConfig, key: jax.Array) -> MoELayer:
  return MoELayer(
    config.model_dim,
    config.moe,
    key=key,
    init_scale=config.init_scale,
    vocab_size=config.vocab_size,
  )


# The names that patterns use, see `ModelConfig.segments`.
_FEED_FORWARDS = {"dense": _dense, "moe": _experts}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossCache:
  """What the mixer keeps, and keys and values of an encoder's output, which stay as they are."""

  mixer: Cache
  encoded: KVCache


class Block(nnx.Module):
  """x + m * mixer(norm(x)), then x + m * feed_forward(norm(x)); m is the residual multiplier.

  In a decoder behind an encoder, x + m * attention(norm(x), encoder's output) stands between them.
  With `norm_placement = post` each is norm(x + m * f(x)) instead.
  """

  def __init__(self, config: ModelConfig, kind: tuple[str, ...], *, key: jax.Array):
    mixer, feed_forward = kind[:2]
    mixer_key, ff_key = jax.random.split(key)
    self.dropout_rate = config.dropout
    self.multiplier = config.residual_multiplier
    self.placement = config.norm_placement
    self.mixer_norm = make_norm(config.norm, config.model_dim, config.norm_epsilon)
    self.mixer = make_mixer(config, mixer, mixer_key)
    if config.cross_attention is not None:
      self.cross_norm = make_norm(config.norm, config.model_dim, config.norm_epsilon)
      self.cross_attention = Attention(
        config.model_dim,
        config.cross_attention,
        key=jax.random.fold_in(key, 2),
        scale=config.init_scale,
        dropout_rate=config.dropout,
      )
    self.feed_forward_norm = make_norm(config.norm, config.model_dim, config.norm_epsilon)
    self.feed_forward = _FEED_FORWARDS[feed_forward](config, ff_key)

  @property
  def has_experts(self) -> bool:
    """Whether the feed-forward is a MoE layer."""
    return isinstance(self.feed_forward, MoELayer)

  def __call__(
    self,
    x: jax.Array,
    context: Context,
    tokens: TokenInfo,
    cache: Cache | CrossCache | None,
    *,
    encoded: AttentionContext | None = None,
    inputs: RouterInputs = NO_INPUTS,
    key: jax.Array | None,
    train: bool,
  ) -> tuple[jax.Array, Cache | None, MoEAux | None]:
    """Maps x (B, L, D) to x, the mixer's new cache, and the router's record if there are experts.

    `encoded` is the context of attention to an encoder's output, for blocks that have it.
    """
    if self.placement == NormPlacement.POST:
      return self._post_norm(
        x, context, tokens, cache, encoded=encoded, inputs=inputs, key=key, train=train
      )
    first, second, cache, aux = self.branches(
      x, context, tokens, cache, encoded=encoded, inputs=inputs, key=key, train=train
    )
    return x + first + second, cache, aux

  def branches(
    self, x, context, tokens, cache, *, encoded=None, inputs, key, train
  ) -> tuple[jax.Array, jax.Array, Cache | None, MoEAux | None]:
    """Returns what attention and the feed-forward add to x, each (B, L, D); see `__call__`."""
    mixer_key, ff_keys = _split(key)
    own, read = _parts(cache)
    first, own = self._mix(self.mixer_norm(x), context, own, mixer_key)
    if encoded is not None:
      first += self._attend_to_encoder(self.cross_norm(x + first), encoded, read, mixer_key)
    second, aux = self._feed_forward(
      self.feed_forward_norm(x + first), tokens, inputs, ff_keys, train
    )
    return first, second, own, aux

  def _post_norm(self, x, context, tokens, cache, *, encoded, inputs, key, train):
    mixer_key, ff_keys = _split(key)
    own, read = _parts(cache)
    change, own = self._mix(x, context, own, mixer_key)
    x = self.mixer_norm(x + change)
    if encoded is not None:
      x = self.cross_norm(x + self._attend_to_encoder(x, encoded, read, mixer_key))
    change, aux = self._feed_forward(x, tokens, inputs, ff_keys, train)
    return self.feed_forward_norm(x + change), own, aux

  def _mix(self, x, context, cache, key):
    y, cache = self.mixer(x, context, cache, key=key)
    return y * self.multiplier, cache

  def _attend_to_encoder(self, x, context, cache, key):
    key = None if key is None else jax.random.fold_in(key, 1)
    y, _ = self.cross_attention(x, context, cache, key=key)
    # A query that may look at nothing must not get the mean of everything.
    y = jnp.where(jnp.any(context.mask, axis=-1, keepdims=True), y, 0)
    return y * self.multiplier

  def _feed_forward(self, x, tokens, inputs, keys, train):
    key, drop_key = keys
    if self.has_experts:
      y, aux = self.feed_forward(
        x,
        token_mask=tokens.mask,
        token_ids=tokens.ids,
        segment_ids=tokens.segment_ids,
        inputs=inputs,
        key=key,
        train=train,
      )
    else:
      y, aux = self.feed_forward(x, key=key), None
    return dropout(y, self.dropout_rate, drop_key) * self.multiplier, aux


def _split(key: jax.Array | None):
  """Returns the key of attention, and two of the feed-forward."""
  mixer_key, *ff_keys = split_key(key, 3)
  return mixer_key, ff_keys


def _parts(cache: Cache | CrossCache | None) -> tuple[Cache | None, KVCache | None]:
  """Returns what the mixer keeps, and keys and values of an encoder's output."""
  return (cache.mixer, cache.encoded) if isinstance(cache, CrossCache) else (cache, None)
