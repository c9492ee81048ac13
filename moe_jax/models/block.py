"""One block: a mixer and a feed-forward, each behind a norm and a residual."""

import jax
from flax import nnx

from moe_jax.layers.dropout import dropout, split_key
from moe_jax.layers.mlp import FeedForward
from moe_jax.layers.norms import make_norm
from moe_jax.models.config import ModelConfig
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


class Block(nnx.Module):
  """x + m * mixer(norm(x)), then x + m * feed_forward(norm(x)); m is the residual multiplier."""

  def __init__(self, config: ModelConfig, kind: tuple[str, ...], *, key: jax.Array):
    mixer, feed_forward = kind[:2]
    mixer_key, ff_key = jax.random.split(key)
    self.dropout_rate = config.dropout
    self.multiplier = config.residual_multiplier
    self.mixer_norm = make_norm(config.norm, config.model_dim, config.norm_epsilon)
    self.mixer = make_mixer(config, mixer, mixer_key)
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
    cache: Cache | None,
    *,
    inputs: RouterInputs = NO_INPUTS,
    key: jax.Array | None,
    train: bool,
  ) -> tuple[jax.Array, Cache | None, MoEAux | None]:
    """Maps x (B, L, D) to x, the new cache, and the router's record if there are experts."""
    first, second, cache, aux = self.branches(
      x, context, tokens, cache, inputs=inputs, key=key, train=train
    )
    return x + first + second, cache, aux

  def branches(
    self, x, context, tokens, cache, *, inputs, key, train
  ) -> tuple[jax.Array, jax.Array, Cache | None, MoEAux | None]:
    """Returns what the mixer and the feed-forward add to x, each (B, L, D); see `__call__`."""
    mixer_key, ff_key, drop_key = split_key(key, 3)
    first, cache = self.mixer(self.mixer_norm(x), context, cache, key=mixer_key)
    first *= self.multiplier
    second, aux = self._feed_forward(
      self.feed_forward_norm(x + first), tokens, inputs, ff_key, train
    )
    second = dropout(second, self.dropout_rate, drop_key) * self.multiplier
    return first, second, cache, aux

  def _feed_forward(self, x, tokens, inputs, key, train):
    if self.has_experts:
      return self.feed_forward(
        x,
        token_mask=tokens.mask,
        token_ids=tokens.ids,
        segment_ids=tokens.segment_ids,
        inputs=inputs,
        key=key,
        train=train,
      )
    return self.feed_forward(x, key=key), None
