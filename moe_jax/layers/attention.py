"""Multi-head attention with grouped key-value heads, rotary positions and a key-value cache."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.layers.dropout import dropout
from moe_jax.layers.parameters import parameter
from moe_jax.layers.rotary import RotaryTable, apply_rotary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of one attention layer: (B, M, Hkv, K) for M cache slots."""

  key: jax.Array
  value: jax.Array

  def write(self, key: jax.Array, value: jax.Array, index: jax.Array) -> "KVCache":
    """Returns the cache with `key` and `value` (B, L, Hkv, K) in the slots from `index` on."""
    return KVCache(_write(self.key, key, index), _write(self.value, value, index))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
  """What every attention layer of a call shares.

  Attributes:
    rotary: cosines and sines of the tokens' positions, see `rotary_table`; made once a call.
    mask: (B, L, M) bool, True = query l may look at slot m; M = L without a cache. Every query
      looks at one slot at least.
    cache_index: int32 scalar, the cache slot of the first token; None without a cache.
  """

  rotary: RotaryTable
  mask: jax.Array
  cache_index: jax.Array | None = None


class Attention(nnx.Module):
  """Causal self-attention; softmax in float32."""

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
    kv = dict(
      shape=(model_dim, c.num_kv_heads, c.head_dim),
      fan_in=model_dim,
      scale=scale,
      axes=("embed", "kv_heads", "head_dim"),
    )
    self.query = parameter(
      keys[0],
      (model_dim, c.num_heads, c.head_dim),
      ("embed", "heads", "head_dim"),
      fan_in=model_dim,
      scale=scale,
    )
    self.key = parameter(keys[1], **kv)
    self.value = parameter(keys[2], **kv)
    self.out = parameter(
      keys[3],
      (c.num_heads, c.head_dim, model_dim),
      ("heads", "head_dim", "embed"),
      fan_in=c.num_heads * c.head_dim,
      scale=scale,
    )

  def __call__(
    self,
    x: jax.Array,
    context: AttentionContext,
    cache: KVCache | None = None,
    *,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Maps x (B, L, D) to (B, L, D), writing keys and values into the cache if there is one."""
    q = apply_rotary(_project(x, self.query), context.rotary)
    k = apply_rotary(_project(x, self.key), context.rotary)
    v = _project(x, self.value)
    if cache is not None:
      cache = cache.write(k, v, context.cache_index)
      k, v = cache.key.astype(x.dtype), cache.value.astype(x.dtype)
    heads = attend(q, k, v, context.mask)
    out = jnp.einsum("BLHK,HKD->BLD", heads, self.out[...].astype(x.dtype))
    return dropout(out, self.dropout_rate, key), cache


def _project(x: jax.Array, weight: nnx.Param) -> jax.Array:
  return jnp.einsum("BLD,DHK->BLHK", x, weight[...].astype(x.dtype))


def _write(old: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)


def attend(
  q_BLHK: jax.Array, k_BMNK: jax.Array, v_BMNK: jax.Array, mask_BLM: jax.Array
) -> jax.Array:
  """Returns softmax(q k^T / sqrt(K)) v, (B, L, H, K): attention of H query heads to N key heads.

  Query head h reads key-value head h // (H / N). The softmax is float32. The heads are moved in
  front of the positions before the products: XLA's CPU backend is twice as slow on the layouts
  that `jax.nn.dot_product_attention` gives it.
  """
  B, L, H, K = q_BLHK.shape
  N = k_BMNK.shape[2]
  queries = q_BLHK.reshape(B, L, N, H // N, K).transpose(0, 2, 3, 1, 4).reshape(B, N, -1, K)
  keys, values = k_BMNK.swapaxes(1, 2), v_BMNK.swapaxes(1, 2)
  logits = jnp.einsum(
    "BNQK,BNMK->BNQM", queries * K**-0.5, keys, preferred_element_type=jnp.float32
  )
  # Finite, so that the derivative of a masked logit is 0 and not NaN.
  bias_BLM = jnp.where(mask_BLM, 0.0, -1e30)
  weights = jax.nn.softmax(logits.reshape(B, N, H // N, L, -1) + bias_BLM[:, None, None], axis=-1)
  weights = weights.astype(values.dtype).reshape(logits.shape)
  out = jnp.einsum("BNQM,BNMK->BNQK", weights, values)
  return out.reshape(B, N, H // N, L, K).transpose(0, 3, 1, 2, 4).reshape(B, L, H, K)


def attention_mask(
  query_slots_L: jax.Array,
  query_positions_BL: jax.Array,
  key_mask_BM: jax.Array,
  key_positions_BM: jax.Array,
  window: int | None,
) -> jax.Array:
  """Returns (B, L, M): a token sees the real tokens at or before it, the last `window` of them.

  A padding query sees itself, so that its (unused) softmax is defined.

  Args:
    query_slots_L: (L,) int32, the queries' places among the M keys.
    query_positions_BL, key_positions_BM: int32, counted in real tokens; the window is measured in
      them.
    key_mask_BM: (B, M) bool, True = real token.
    window: see `AttentionConfig`.
  """
  slots = jnp.arange(key_mask_BM.shape[1])
  mask = (slots[None, :] <= query_slots_L[:, None])[None] & key_mask_BM[:, None, :]
  if window is not None:
    mask &= query_positions_BL[:, :, None] - key_positions_BM[:, None, :] < window
  return mask | (slots[None, :] == query_slots_L[:, None])[None]
