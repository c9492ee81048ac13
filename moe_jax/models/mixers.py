"""The modules behind the mixer words of `ModelConfig.segments`."""

from typing import Any, Protocol

import jax

from moe_jax.layers.attention import Attention, KVCache
from moe_jax.layers.attention_context import AttentionContext, Places
from moe_jax.layers.latent_attention import LatentAttention, LatentCache
from moe_jax.layers.mamba import Mamba, MambaCache
from moe_jax.layers.mamba_context import MambaContext
from moe_jax.models.config import ModelConfig

Cache = KVCache | LatentCache | MambaCache
Context = AttentionContext | MambaContext


class Mixer(Protocol):
  """A module that moves information between the tokens of a row."""

  @staticmethod
  def context(config: Any, places: Places) -> Context:
    """Returns what all layers of this config share in a call."""

  @staticmethod
  def empty_cache(config: Any, slots: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Cache:
    """Returns a cache of zeros for `slots` (..., B, M)."""

  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None, *, key: jax.Array | None
  ) -> tuple[jax.Array, Cache | None]:
    """Maps x (B, L, D) to (B, L, D), and the cache to the one that holds these tokens too."""


_MODULES: dict[str, type[Mixer]] = {
  "attention": Attention,
  "global_attention": Attention,
  "latent_attention": LatentAttention,
  "mamba": Mamba,
}


def make_mixer(config: ModelConfig, word: str, key: jax.Array) -> Mixer:
  """Returns a new mixer of that kind."""
  return _MODULES[word](
    config.model_dim,
    config.mixers()[word],
    key=key,
    scale=config.init_scale,
    dropout_rate=config.dropout,
  )


def mixer_contexts(config: ModelConfig, places: Places) -> dict[str, Context]:
  """Returns the context of every kind of mixer that the model has, by its word."""
  return {word: _MODULES[word].context(each, places) for word, each in config.mixers().items()}


def empty_cache(config: ModelConfig, word: str, slots: tuple[int, ...]) -> Cache:
  """Returns an empty cache of that kind of mixer for `slots` (..., B, M)."""
  return _MODULES[word].empty_cache(config.mixers()[word], slots, config.dtype)
