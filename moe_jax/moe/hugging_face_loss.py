"""Router losses as Hugging Face's MoE models define them, for comparison with their figures."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moe_jax.sharding.local import row_top_k


def hugging_face_load_balance_loss(
  router_logits: Sequence[jax.Array], top_k: int, *, token_mask: jax.Array | None = None
) -> jax.Array:
  """Returns E * sum_e f_e P_e over the tokens of all layers together, a float32 scalar.

  `load_balancing_loss_func` of transformers 5 (Mixtral, Qwen, OLMoE, gpt-oss, Granite, Phi, DBRX):
  f_e counts the tokens, of any layer, that have e among the K largest probabilities, and sums to K,
  so uniform routing gives K; P_e is the mean softmax over all layers. It is the product of two
  means over layers, where `ModelAux.losses` has the mean of products. Padding is left out.

  Args:
    router_logits: (B, L, E) float32 of every MoE layer, as in `ModelAux.router_logits`.
    top_k: K.
    token_mask: (B, L) bool, True = real token; None = all real.
  """
  logits_NE = jnp.concatenate([each.reshape(-1, each.shape[-1]) for each in router_logits])
  experts = logits_NE.shape[-1]
  real_N = jnp.ones(logits_NE.shape[:1], bool)
  if token_mask is not None:
    real_N = jnp.tile(token_mask.reshape(-1), len(router_logits))
  probs_NE = jax.nn.softmax(logits_NE, axis=-1)
  chosen_NE = jax.nn.one_hot(row_top_k(probs_NE, top_k)[1], experts).sum(axis=1)
  f_E = jnp.mean(chosen_NE, axis=0, where=real_N[:, None])
  P_E = jnp.mean(probs_NE, axis=0, where=real_N[:, None])
  return experts * jnp.sum(f_E * P_E)


def switch_router_losses(router_logits: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Returns balance loss and z-loss of one stack as transformers' Switch has them, float32 scalars.

  The layers' tokens follow each other in one sequence, of which f and P are means; the balance loss
  E * sum_e f_e P_e is then a mean over sequences (`load_balancing_loss_func` and
  `router_z_loss_func` of its Switch Transformers). Padding counts, and so does what was dropped.
  The original's training loss takes both as 0 for stacks whose layers all have experts.

  Args:
    router_logits: (B, L, E) float32 of every MoE layer of the encoder, or of the decoder.
  """
  logits_BNE = jnp.concatenate(router_logits, axis=1)
  E = logits_BNE.shape[-1]
  f_BE = jnp.mean(jax.nn.one_hot(jnp.argmax(logits_BNE, axis=-1), E), axis=1)
  P_BE = jnp.mean(jax.nn.softmax(logits_BNE, axis=-1), axis=1)
  z_loss = jnp.mean(jnp.square(jax.nn.logsumexp(logits_BNE, axis=-1)))
  return E * jnp.mean(jnp.sum(f_BE * P_BE, axis=-1)), z_loss
