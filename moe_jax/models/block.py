"""One block: a mixer and a feed-forward, each behind a norm and a residual."""

import jax
from flax import nnx

from moe_jax.layers.attention import Attention, AttentionContext, KVCache
from moe_jax.layers.dropout import dropout, split_key
from moe_jax.layers.mlp import FeedForward
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.config import ModelConfig
from moe_jax.moe.layer import MoEAux, MoELayer


class Block(nnx.Module):
  """x + mixer(norm(x)), then x + feed_forward(norm(x))."""

  def __init__(self, config: ModelConfig, kind: tuple[str, str], *, key: jax.Array):
    _, feed_forward = kind
    mixer_key, ff_key = jax.random.split(key)
    self.dropout_rate = config.dropout
    self.mixer_norm = RMSNorm(config.model_dim, config.norm_epsilon)
    self.mixer = Attention(
      config.model_dim,
      config.attention,
      key=mixer_key,
      scale=config.init_scale,
      dropout_rate=config.dropout,
    )
    self.feed_forward_norm = RMSNorm(config.model_dim, config.norm_epsilon)
    self.has_experts = feed_forward == "moe"
    if self.has_experts:
      self.feed_forward = MoELayer(
        config.model_dim, config.moe, key=ff_key, init_scale=config.init_scale
      )
    else:
      self.feed_forward = FeedForward(
        config.model_dim, config.mlp, key=ff_key, scale=config.init_scale
      )

  def __call__(
    self,
    x: jax.Array,
    context: AttentionContext,
    token_mask: jax.Array,
    cache: KVCache | None,
    *,
    key: jax.Array | None,
    train: bool,
  ) -> tuple[jax.Array, KVCache | None, MoEAux | None]:
    """Maps x (B, L, D) to x, the new cache, and the router's record if there are experts."""
    mixer_key, ff_key, drop_key = split_key(key, 3)
    y, cache = self.mixer(self.mixer_norm(x), context, cache, key=mixer_key)
    x = x + y
    y, aux = self._feed_forward(self.feed_forward_norm(x), token_mask, ff_key, train)
    return x + dropout(y, self.dropout_rate, drop_key), cache, aux

  def _feed_forward(self, x, token_mask, key, train):
    if self.has_experts:
      return self.feed_forward(x, token_mask=token_mask, key=key, train=train)
    return self.feed_forward(x, key=key), None
