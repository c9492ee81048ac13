"""The attention product: softmax(q k^T) v for grouped heads."""

import jax
import jax.numpy as jnp


def attend(
  q_BLHK: jax.Array,
  k_BMNK: jax.Array,
  v_BMNK: jax.Array,
  mask_BLM: jax.Array,
  *,
  scale: float | None = None,
  bias_HBLM: jax.Array | None = None,
  sinks_H: jax.Array | None = None,
) -> jax.Array:
  """Returns softmax(scale q k^T + bias) v, (B, L, H, K'): attention of H query to N key heads.

  Query head h reads key-value head h // (H / N). The softmax is float32. The heads are moved in
  front of the positions before the products: XLA's CPU backend is twice as slow on the layouts
  that `jax.nn.dot_product_attention` gives it.

  Args:
    q_BLHK: queries.
    k_BMNK: keys.
    v_BMNK: values; their width K' may differ from that of the keys.
    mask_BLM: True = query l may look at key m.
    scale: of the products; None = K^-0.5.
    bias_HBLM: float32, added to the scaled products.
    sinks_H: float32, one more logit of each head's softmax, whose weight goes to no value.
  """
  B, L, H, K = q_BLHK.shape
  N = k_BMNK.shape[2]
  queries = q_BLHK.reshape(B, L, N, H // N, K).transpose(0, 2, 3, 1, 4).reshape(B, N, -1, K)
  keys, values = k_BMNK.swapaxes(1, 2), v_BMNK.swapaxes(1, 2)
  logits = jnp.einsum(
    "BNQK,BNMK->BNQM",
    queries * (K**-0.5 if scale is None else scale),
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
