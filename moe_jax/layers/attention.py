"""Multi-head attention with grouped key-value heads and a key-value cache."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.attend import attend
from moe_jax.layers.attention_config import AttentionConfig, Positions, QKNorm
from moe_jax.layers.attention_context import AttentionContext, Places, attention_mask
from moe_jax.layers.dropout import dropout
from moe_jax.layers.norms import RMSNorm, root_mean_square_norm
from moe_jax.layers.parameters import like, parameter, with_axes
from moe_jax.layers.relative_bias import relative_buckets
from moe_jax.layers.rotary import apply_rotary, rotary_table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of one attention layer: (B, M, Hkv, K) for M cache slots."""

  key: jax.Array
  value: jax.Array

  def write(self, key: jax.Array, value: jax.Array, index: jax.Array) -> "KVCache":
    """Returns the cache with `key` and `value` (B, L, Hkv, K) in the slots from `index` on."""
    return KVCache(write_slots(self.key, key, index), write_slots(self.value, value, index))


def write_slots(old: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
  """Returns old (B, M, ...) with new (B, L, ...) in the slots from `index` on."""
  return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)


class Attention(nnx.Module):
  """Attention of tokens to tokens, or to an encoder's output; softmax in float32.

  Attributes:
    query, key, value: (D, H, K) and twice (D, Hkv, K).
    query_bias, key_bias, value_bias: (H, K) and twice (Hkv, K), with `qkv_bias`.
    query_norm, key_norm: with a norm that has scales.
    relative_bias: (buckets, H), zeros at first; not with `relative_bias_shared`.
    sinks: (H,), zeros at first.
    out, out_bias: (H, K, D) and (D,), the latter with `out_bias`.
  """

  def __init__(
    self,
    model_dim: int,
    config: AttentionConfig,
    *,
    key: jax.Array,
    scale: float,
    dropout_rate: float = 0.0,
  ):
    self.config = config
    self.dropout_rate = dropout_rate
    c, keys = config, jax.random.split(key, 4)

    def projection(key, heads, axis):
      shape, axes = (model_dim, heads, c.head_dim), ("embed", axis, "head_dim")
      return parameter(key, shape, axes, fan_in=model_dim, scale=scale)

    self.query = projection(keys[0], c.num_heads, "heads")
    self.key = projection(keys[1], c.num_kv_heads, "kv_heads")
    self.value = projection(keys[2], c.num_kv_heads, "kv_heads")
    self.out = parameter(
      keys[3],
      (c.num_heads, c.head_dim, model_dim),
      ("heads", "head_dim", "embed"),
      fan_in=c.num_heads * c.head_dim,
      scale=scale,
    )
    self._add_options(model_dim)

  def _add_options(self, model_dim: int) -> None:
    """Makes the parameters that only some configs have; none of them draws random numbers."""
    c = self.config
    if c.qkv_bias:
      self.query_bias = _zeros((c.num_heads, c.head_dim), ("heads", "bias"))
      self.key_bias = _zeros((c.num_kv_heads, c.head_dim), ("kv_heads", "bias"))
      self.value_bias = _zeros((c.num_kv_heads, c.head_dim), ("kv_heads", "bias"))
    if c.out_bias:
      self.out_bias = _zeros((model_dim,), ("bias",))
    if c.qk_norm in (QKNorm.HEAD, QKNorm.PROJECTION):
      heads = c.qk_norm == QKNorm.PROJECTION
      self.query_norm = RMSNorm((c.num_heads if heads else 1) * c.head_dim, c.qk_norm_epsilon)
      self.key_norm = RMSNorm((c.num_kv_heads if heads else 1) * c.head_dim, c.qk_norm_epsilon)
    if c.relative_bias_buckets is not None and not c.relative_bias_shared:
      self.relative_bias = relative_bias_table(c)
    if c.sinks:
      self.sinks = _zeros((c.num_heads,), ("bias",))

  @staticmethod
  def context(config: AttentionConfig, places: Places) -> AttentionContext:
    """Returns what the layers of this config share in a call."""
    c, positions, rotary, scale, buckets = config, places.query_positions, None, None, None
    if c.positions == Positions.ROTARY:
      width = c.rotary_dim or c.head_dim
      rotary = rotary_table(positions, width, c.rope_theta, c.rope_scaling)
    if c.query_temperature_floor is not None:
      steps = jnp.floor_divide(positions + 1, c.query_temperature_floor).astype(jnp.float32)
      scale = jnp.log1p(steps) * c.query_temperature_scale + 1.0
    if c.relative_bias_buckets is not None:
      buckets = relative_buckets(
        positions,
        places.key_positions,
        c.relative_bias_buckets,
        c.relative_bias_max_distance,
        causal=places.causal,
      )
    mask = attention_mask(places, window=c.window, chunk=c.chunk)
    return AttentionContext(rotary, mask, places.cache_index, scale, buckets)

  @staticmethod
  def empty_cache(
    config: AttentionConfig, slots: tuple[int, ...], dtype: jax.typing.DTypeLike
  ) -> KVCache:
    """Returns a cache of zeros; `slots` are the axes before the heads, (..., B, M)."""
    shape = (*slots, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  def __call__(
    self,
    x: jax.Array,
    context: AttentionContext,
    cache: KVCache | None = None,
    *,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Maps x (B, L, D) to (B, L, D), writing keys and values into the cache if there is one.

    A cache of an encoder's output, whose context has no index, is complete and is only read.
    """
    q = self._position(self._project(x, "query"), context)
    if context.query_scale is not None:
      q = (q * context.query_scale[:, :, None, None]).astype(x.dtype)
    seen, cache = self._seen(x, context, cache)
    k, v = seen.key.astype(x.dtype), seen.value.astype(x.dtype)
    bias, sinks = context.bias, None
    if hasattr(self, "relative_bias"):
      bias = self.relative_bias[...].T[:, context.buckets]
    if self.config.sinks:
      sinks = self.sinks[...]
    heads = attend(
      q,
      k,
      v,
      context.mask,
      scale=self.config.scale,
      bias_HBLM=bias,
      sinks_H=sinks,
      block=self.config.query_block,
    )
    out = jnp.einsum("BLHK,HKD->BLD", heads, self.out[...].astype(x.dtype))
    if self.config.out_bias:
      out += like(self.out_bias[...], out)
    return dropout(out, self.dropout_rate, key), cache

  def keys_values(self, x: jax.Array, context: AttentionContext) -> KVCache:
    """Returns the keys and values (B, M, Hkv, K) of x (B, M, D) at the context's places."""
    key = self._position(self._project(x, "key"), context)
    return KVCache(key, self._project(x, "value"))

  def _seen(
    self, x: jax.Array, context: AttentionContext, cache: KVCache | None
  ) -> tuple[KVCache, KVCache | None]:
    """Returns the keys and values that queries look at, and the new cache if there is one."""
    if cache is not None and context.cache_index is None:
      return cache, cache
    new = self.keys_values(x if context.source is None else context.source, context)
    if cache is None:
      return new, None
    cache = cache.write(new.key, new.value, context.cache_index)
    return cache, cache

  def _project(self, x: jax.Array, name: str) -> jax.Array:
    """Returns queries, keys or values (B, L, H, K), with their bias, norm and clip."""
    c = self.config
    heads = jnp.einsum("BLD,DHK->BLHK", x, getattr(self, name)[...].astype(x.dtype))
    if c.qkv_bias:
      heads += like(getattr(self, f"{name}_bias")[...], heads)
    normed = name != "value"
    if c.qk_norm == QKNorm.PROJECTION and normed:
      together = heads.reshape(*heads.shape[:2], -1)
      heads = getattr(self, f"{name}_norm")(together).reshape(heads.shape)
    if c.qkv_clip is not None:
      heads = jnp.clip(heads, -c.qkv_clip, c.qkv_clip)
    if c.qk_norm == QKNorm.HEAD and normed:
      heads = getattr(self, f"{name}_norm")(heads)
    return heads

  def _position(self, heads: jax.Array, context: AttentionContext) -> jax.Array:
    """Rotates queries or keys, and normalises them where the config does so afterwards."""
    if context.rotary is not None:
      heads = apply_rotary(heads, context.rotary, self.config.rotary_layout)
    if self.config.qk_norm == QKNorm.L2:
      heads = root_mean_square_norm(heads, self.config.qk_norm_epsilon)
    return heads


def relative_bias_table(config: AttentionConfig) -> nnx.Param:
  """Returns a new table of relative biases, (buckets, H), zeros."""
  return _zeros((config.relative_bias_buckets, config.num_heads), ("bias", "heads"))


def cross_context(encoded: jax.Array | None, mask: jax.Array) -> AttentionContext:
  """Returns the context of attention to an encoder's output.

  Args:
    encoded: (B, M, D); None where a cache holds its keys and values.
    mask: (B, L, M) bool, True = query l may look at m.
  """
  return AttentionContext(None, mask, source=encoded)


def _zeros(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
  return with_axes(jnp.zeros(shape, jnp.float32), axes)
