"""Soft MoE (arXiv 2308.00951): every slot is a mixture of tokens; nothing is dropped."""

import jax
import jax.numpy as jnp

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.registry import Chooser, SelectView, SlotMixture, register_selection


@register_selection("soft", chooser=Chooser.SLOT, causal=False)
def soft(view: SelectView, config: RoutingConfig) -> SlotMixture:
  """Mixes all real tokens of a group into each slot, and all slots into each token.

  Logits (G, S, E * C): dispatch is a softmax over tokens (Eq. 1), combine one over all slots
  (Eq. 3). Both are 0 for padding.
  """
  real_GS1 = view.mask[..., None]
  # Finite, so that a group of padding alone has a finite gradient too.
  lowest = jnp.finfo(jnp.float32).min / 2
  dispatch = jax.nn.softmax(jnp.where(real_GS1, view.logits, lowest), axis=1)
  combine = jax.nn.softmax(view.logits, axis=-1)
  shape = (*view.mask.shape, config.num_experts, view.capacity)
  return SlotMixture(*(jnp.where(real_GS1, a, 0.0).reshape(shape) for a in (dispatch, combine)))
