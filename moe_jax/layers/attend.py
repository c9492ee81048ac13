"""The attention product: softmax(q k^T) v for grouped heads."""

import functools

import jax
import jax.numpy as jnp

from moe_jax.sharding.config import ContextParallel
from moe_jax.sharding.context import constrain, current_layout
from moe_jax.sharding.ring_attention import Scores, ring_attend


def attend(
  q_BLHK: jax.Array,
  k_BMNK: jax.Array,
  v_BMNK: jax.Array,
  mask_BLM: jax.Array,
  *,
  scale: float | None = None,
  bias_HBLM: jax.Array | None = None,
  sinks_H: jax.Array | None = None,
  block: int | None = None,
) -> jax.Array:
  """Returns softmax(scale q k^T + bias) v, (B, L, H, K'): attention of H query to N key heads.

  Query head h reads key-value head h // (H / N). The softmax is float32. The heads are moved in
  front of the positions before the products: XLA's CPU backend is twice as slow on the layouts
  that `jax.nn.dot_product_attention` gives it. Where a mesh splits sequences, its layout says how
  queries reach the keys of other devices.

  Args:
    q_BLHK: queries.
    k_BMNK: keys.
    v_BMNK: values; their width K' may differ from that of the keys.
    mask_BLM: True = query l may look at key m.
    scale: of the products; None = K^-0.5.
    bias_HBLM: float32, added to the scaled products.
    sinks_H: float32, one more logit of each head's softmax, whose weight goes to no value.
    block: queries at a time. Their products with all keys are the only ones in memory, and are
      made again in the backward pass; None for all at once. The result is the same.
  """
  attend_some = functools.partial(_attend, scale=scale, sinks_H=sinks_H)
  L = q_BLHK.shape[1]
  if block is None or block >= L:
    return attend_some(q_BLHK, k_BMNK, v_BMNK, mask_BLM, bias_HBLM)
  # In float32 because the gradients of all blocks add up in the dtype of what they share.
  keys, values = k_BMNK.astype(jnp.float32), v_BMNK.astype(jnp.float32)

  @jax.checkpoint
  def one_block(queries, mask, bias):
    k, v = keys.astype(k_BMNK.dtype), values.astype(v_BMNK.dtype)
    return attend_some(queries, k, v, mask, bias)

  whole = L // block * block
  parts = [_cut(a, block, axis) for a, axis in ((q_BLHK, 1), (mask_BLM, 1), (bias_HBLM, 2))]
  out = jax.lax.map(lambda part: one_block(*part), tuple(parts))
  out = out.swapaxes(0, 1).reshape(q_BLHK.shape[0], whole, *out.shape[3:])
  if whole == L:
    return out
  bias = None if bias_HBLM is None else bias_HBLM[:, :, whole:]
  rest = one_block(q_BLHK[:, whole:], mask_BLM[:, whole:], bias)
  return jnp.concatenate([out, rest], axis=1)


def _cut(a: jax.Array | None, block: int, axis: int) -> jax.Array | None:
  """Returns the whole blocks along an axis, stacked in front."""
  if a is None:
    return None
  count = a.shape[axis] // block
  a = jax.lax.slice_in_dim(a, 0, count * block, axis=axis)
  shape = (*a.shape[:axis], count, block, *a.shape[axis + 1 :])
  return jnp.moveaxis(a.reshape(shape), axis, 0)


def _attend(
  q_BLHK: jax.Array,
  k_BMNK: jax.Array,
  v_BMNK: jax.Array,
  mask_BLM: jax.Array,
  bias_HBLM: jax.Array | None,
  *,
  scale: float | None,
  sinks_H: jax.Array | None,
) -> jax.Array:
  B, L, H, K = q_BLHK.shape
  N = k_BMNK.shape[2]
  scale = K**-0.5 if scale is None else scale
  layout = current_layout()
  if layout is not None and layout.parts("length") > 1:
    if layout.config.context == ContextParallel.RING:
      scores = Scores(mask_BLM, bias_HBLM, sinks_H)
      return ring_attend(q_BLHK, k_BMNK, v_BMNK, scores, scale, layout)
    k_BMNK, v_BMNK = (constrain(a, ("batch", None, "kv_heads", None)) for a in (k_BMNK, v_BMNK))
  queries = q_BLHK.reshape(B, L, N, H // N, K).transpose(0, 2, 3, 1, 4).reshape(B, N, -1, K)
  keys, values = k_BMNK.swapaxes(1, 2), v_BMNK.swapaxes(1, 2)
  logits = jnp.einsum(
    "BNQK,BNMK->BNQM",
    queries * scale,
    keys,
    preferred_element_type=jnp.float32,
  )
  # Finite, so that the derivative of a masked logit is 0 and not NaN.
  bias_BLM = jnp.where(mask_BLM, 0.0, -1e30)
  by_head = logits.reshape(B, N, H // N, L, -1) + bias_BLM[:, None, None]
  if bias_HBLM is not None:
    by_head += bias_HBLM.reshape(N, H // N, *bias_HBLM.shape[1:]).transpose(2, 0, 1, 3, 4)
  weights = _softmax(by_head, sinks_H).astype(values.dtype).reshape(logits.shape)
  out = jnp.einsum("BNQM,BNMK->BNQK", weights, values)
  return out.reshape(B, N, H // N, L, -1).transpose(0, 3, 1, 2, 4).reshape(B, L, H, -1)


def _softmax(logits_BNHLM: jax.Array, sinks_H: jax.Array | None) -> jax.Array:
  """Returns the softmax over M, with a sink's logit in the denominator if there are sinks."""
  if sinks_H is None:
    return jax.nn.softmax(logits_BNHLM, axis=-1)
  sinks = sinks_H.reshape(1, *logits_BNHLM.shape[1:3], 1, 1)
  largest = jnp.maximum(jnp.max(logits_BNHLM, axis=-1, keepdims=True), sinks)
  largest = jax.lax.stop_gradient(largest)
  exponents = jnp.exp(logits_BNHLM - largest)
  return exponents / (jnp.sum(exponents, axis=-1, keepdims=True) + jnp.exp(sinks - largest))
