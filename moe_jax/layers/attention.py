"""Multi-head attention with grouped key-value heads, rotary positions and a key-value cache."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.layers.dropout import dropout
from moe_jax.layers.parameters import parameter
from moe_jax.layers.rotary import apply_rotary


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Causal self-attention.

  Attributes:
    num_heads: H query heads.
    num_kv_heads: key-value heads; must divide H (GQA, arXiv 2305.13245).
    head_dim: width of a head; even, for rotary positions.
    rope_theta: base of the rotary frequencies.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10_000.0

  def __post_init__(self):
    for name in ("num_heads", "num_kv_heads", "head_dim"):
      if getattr(self, name) < 1:
        raise UserError(f"{name} = {getattr(self, name)} is refused: it must be at least 1")
    if self.num_heads % self.num_kv_heads:
      raise UserError(f"num_kv_heads = {self.num_kv_heads} does not divide num_heads ="
                      f" {self.num_heads}; the nearest that does is {self._nearest_divisor()}")
    if self.head_dim % 2:
      raise UserError(f"head_dim = {self.head_dim} is odd; rotary positions need an even width,"
                      f" for example {self.head_dim + 1}")
    if not self.rope_theta > 0:
      raise UserError(f"rope_theta = {self.rope_theta} is refused: it must be greater than 0")

  def _nearest_divisor(self) -> int:
    divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
    return min(divisors, key=lambda n: abs(n - self.num_kv_heads))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of one attention layer: (B, M, Hkv, K) for M cache slots."""

  key: jax.Array
  value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
  """What every attention layer of a call shares.

  Attributes:
    positions: (B, L) int32, rotary positions of the tokens.
    mask: (B, 1, L, M) bool, True = query l may look at slot m; M = L without a cache.
    cache_index: int32 scalar, the cache slot of the first token; None without a cache.
  """

  positions: jax.Array
  mask: jax.Array
  cache_index: jax.Array | None = None


class Attention(nnx.Module):
  """Causal self-attention; softmax in float32."""

  def __init__(
    self, model_dim: int, config: AttentionConfig, *, key: jax.Array, scale: float,
    dropout_rate: float = 0.0,
  ):
    self.config = config
    self.dropout_rate = dropout_rate
    c, keys = config, jax.random.split(key, 4)
    kv = dict(shape=(model_dim, c.num_kv_heads, c.head_dim), fan_in=model_dim, scale=scale,
              axes=("embed", "kv_heads", "head_dim"))
    self.query = parameter(keys[0], (model_dim, c.num_heads, c.head_dim),
                           ("embed", "heads", "head_dim"), fan_in=model_dim, scale=scale)
    self.key = parameter(keys[1], **kv)
    self.value = parameter(keys[2], **kv)
    self.out = parameter(keys[3], (c.num_heads, c.head_dim, model_dim),
                         ("heads", "head_dim", "embed"), fan_in=c.num_heads * c.head_dim,
                         scale=scale)

  def __call__(
    self,
    x: jax.Array,
    context: AttentionContext,
    cache: KVCache | None = None,
    *,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Maps x (B, L, D) to (B, L, D), writing keys and values into the cache if there is one."""
    project = lambda w: jnp.einsum("BLD,DHK->BLHK", x, w[...].astype(x.dtype))
    q = apply_rotary(project(self.query), context.positions, self.config.rope_theta)
    k = apply_rotary(project(self.key), context.positions, self.config.rope_theta)
    v = project(self.value)
    if cache is not None:
      write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
        old, new.astype(old.dtype), context.cache_index, axis=1)
      cache = KVCache(write(cache.key, k), write(cache.value, v))
      k, v = cache.key.astype(x.dtype), cache.value.astype(x.dtype)
    heads = jax.nn.dot_product_attention(q, k, v, mask=context.mask)
    out = jnp.einsum("BLHK,HKD->BLD", heads, self.out[...].astype(x.dtype))
    return dropout(out, self.dropout_rate, key), cache


def causal_mask(token_mask_BL: jax.Array, segment_ids_BL: jax.Array | None) -> jax.Array:
  """Returns (B, 1, L, L): a token sees real tokens at or before it in its own segment.

  A padding query sees itself, so that its (unused) softmax is defined.
  """
  L = token_mask_BL.shape[1]
  steps = jnp.arange(L)
  mask = (steps[:, None] >= steps[None, :])[None] & token_mask_BL[:, None, :]
  if segment_ids_BL is not None:
    mask &= segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
  return (mask | jnp.eye(L, dtype=bool)[None])[:, None]
