"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1).

Two forms of one function. Without a cache, keys and values of all heads are expanded from the
latents (Eqs. 41 to 46): fewest operations for a whole sequence. With one, the expansions are
absorbed into the queries and the outputs, (q W_UK^T) c instead of q (W_UK c): every head then
attends to the latents themselves, and a step reads kv_rank + rope_dim numbers a cached token
instead of all heads' keys and values.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.attend import attend
from moe_jax.layers.attention import write_slots
from moe_jax.layers.attention_config import LatentAttentionConfig
from moe_jax.layers.attention_context import AttentionContext, Places, attention_mask
from moe_jax.layers.dropout import dropout
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.parameters import parameter
from moe_jax.layers.rotary import apply_rotary, rotary_table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
  """What one layer keeps of M tokens.

  Attributes:
    latent: (B, M, R) normalised latents, R = kv_rank.
    rope_key: (B, M, K) rotated keys that all heads share, K = rope_dim.
  """

  latent: jax.Array
  rope_key: jax.Array

  def write(self, latent: jax.Array, rope_key: jax.Array, index: jax.Array) -> "LatentCache":
    """Returns the cache with latents and keys of L tokens in the slots from `index` on."""
    return LatentCache(
      write_slots(self.latent, latent, index), write_slots(self.rope_key, rope_key, index)
    )


class LatentAttention(nnx.Module):
  """Causal self-attention through latents; softmax in float32.

  Attributes:
    query: (D, H, nope_dim + rope_dim), the last axis in this order; without `query_rank`.
    query_down, query_norm, query_up: (D, query_rank), and (query_rank, H, nope_dim + rope_dim);
      with it.
    latent_down, latent_norm: (D, kv_rank).
    rope_key: (D, rope_dim).
    key_up, value_up: (kv_rank, H, nope_dim) and (kv_rank, H, value_dim).
    out: (H, value_dim, D).
  """

  def __init__(
    self,
    model_dim: int,
    config: LatentAttentionConfig,
    *,
    key: jax.Array,
    scale: float,
    dropout_rate: float = 0.0,
  ):
    self.config = config
    self.dropout_rate = dropout_rate
    c, keys = config, list(jax.random.split(key, 7))

    def projection(shape, axes, fan_in=None):
      return parameter(keys.pop(), shape, axes, fan_in=fan_in or shape[0], scale=scale)

    heads = ("heads", "head_dim")
    query_shape = (c.num_heads, c.nope_dim + c.rope_dim)
    if c.query_rank is None:
      self.query = projection((model_dim, *query_shape), ("embed", *heads))
    else:
      self.query_down = projection((model_dim, c.query_rank), ("embed", "latent"))
      self.query_norm = RMSNorm(c.query_rank, c.norm_epsilon)
      self.query_up = projection((c.query_rank, *query_shape), ("latent_in", *heads))
    self.latent_down = projection((model_dim, c.kv_rank), ("embed", "latent"))
    self.latent_norm = RMSNorm(c.kv_rank, c.norm_epsilon)
    self.rope_key = projection((model_dim, c.rope_dim), ("embed", "head_dim"))
    self.key_up = projection((c.kv_rank, c.num_heads, c.nope_dim), ("latent_in", *heads))
    self.value_up = projection((c.kv_rank, c.num_heads, c.value_dim), ("latent_in", *heads))
    out_shape = (c.num_heads, c.value_dim, model_dim)
    self.out = projection(out_shape, (*heads, "embed"), fan_in=c.num_heads * c.value_dim)

  @staticmethod
  def context(config: LatentAttentionConfig, places: Places) -> AttentionContext:
    """Returns what the layers of this config share in a call."""
    c = config
    rotary = rotary_table(places.query_positions, c.rope_dim, c.rope_theta, c.rope_scaling)
    return AttentionContext(rotary, attention_mask(places), places.cache_index)

  @staticmethod
  def empty_cache(
    config: LatentAttentionConfig, slots: tuple[int, ...], dtype: jax.typing.DTypeLike
  ) -> LatentCache:
    """Returns a cache of zeros; `slots` are the axes before the widths, (..., B, M)."""
    return LatentCache(
      jnp.zeros((*slots, config.kv_rank), dtype), jnp.zeros((*slots, config.rope_dim), dtype)
    )

  def __call__(
    self,
    x: jax.Array,
    context: AttentionContext,
    cache: LatentCache | None = None,
    *,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, LatentCache | None]:
    """Maps x (B, L, D) to (B, L, D), writing latents into the cache if there is one."""
    nope, rope = self._queries(x, context)
    latent = self.latent_norm(_product("BLD,DR->BLR", x, self.latent_down))
    rope_key = _product("BLD,DK->BLK", x, self.rope_key)[:, :, None]
    rope_key = apply_rotary(rope_key, context.rotary, self.config.rotary_layout)[:, :, 0]
    if cache is None:
      heads = self._expanded(nope, rope, latent, rope_key, context.mask)
    else:
      cache = cache.write(latent, rope_key, context.cache_index)
      latent, rope_key = cache.latent.astype(x.dtype), cache.rope_key.astype(x.dtype)
      heads = self._absorbed(nope, rope, latent, rope_key, context.mask)
    out = _product("BLHK,HKD->BLD", heads, self.out)
    return dropout(out, self.dropout_rate, key), cache

  def _queries(self, x, context) -> tuple[jax.Array, jax.Array]:
    """Returns the queries' parts without and with positions, (B, L, H, ...) each."""
    c = self.config
    if c.query_rank is None:
      queries = _product("BLD,DHK->BLHK", x, self.query)
    else:
      latent = self.query_norm(_product("BLD,DR->BLR", x, self.query_down))
      queries = _product("BLR,RHK->BLHK", latent, self.query_up)
    nope, rope = jnp.split(queries, [c.nope_dim], axis=-1)
    return nope, apply_rotary(rope, context.rotary, c.rotary_layout)

  def _expanded(self, nope, rope, latent_BMR, rope_key_BMK, mask) -> jax.Array:
    """Returns each head's values (B, L, H, value_dim) by expanded keys and values."""
    keys = _product("BMR,RHK->BMHK", latent_BMR, self.key_up)
    values = _product("BMR,RHK->BMHK", latent_BMR, self.value_up)
    shared = jnp.broadcast_to(rope_key_BMK[:, :, None], (*keys.shape[:-1], rope_key_BMK.shape[-1]))
    queries = jnp.concatenate([nope, rope], axis=-1)
    keys = jnp.concatenate([keys, shared], axis=-1)
    c = self.config
    return attend(queries, keys, values, mask, scale=c.scale, block=c.query_block)

  def _absorbed(self, nope, rope, latent_BMR, rope_key_BMK, mask) -> jax.Array:
    """Returns the same with one key-value head, whose values are the latents."""
    queries = jnp.concatenate([_product("BLHK,RHK->BLHR", nope, self.key_up), rope], axis=-1)
    keys = jnp.concatenate([latent_BMR, rope_key_BMK], axis=-1)[:, :, None]
    mixed = attend(queries, keys, latent_BMR[:, :, None], mask, scale=self.config.scale)
    return _product("BLHR,RHK->BLHK", mixed, self.value_up)


def _product(spec: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
  return jnp.einsum(spec, x, weight[...].astype(x.dtype))
