"""Weigh stage: scores of the selected experts -> combine weights in float32."""

import jax
import jax.numpy as jnp

from moe_jax.moe.types import Weighting


def weigh(
  scores_GSE: jax.Array,
  logits_GSE: jax.Array,
  expert_GSK: jax.Array,
  kept_GSK: jax.Array,
  weighting: Weighting,
) -> jax.Array:
  """Returns the combine weights (G, S, K) float32, 0 where `kept_GSK` is False.

  Args:
    scores_GSE, logits_GSE: (G, S, E) float32.
    expert_GSK: (G, S, K) int32, the selected experts.
    kept_GSK: (G, S, K) bool, the assignments that have a slot.
    weighting: see `Weighting`. `renormalized` divides by the sum over the selected experts,
      whether they were used and kept or not (GShard Algorithm 1 normalises first);
      `renormalized_after_drop` by the sum over the kept ones, so a token's weights sum to 1 unless
      it lost all its experts.
  """
  if weighting == Weighting.SOFTMAX_SELECTED:
    weight_GSK = jax.nn.softmax(jnp.take_along_axis(logits_GSE, expert_GSK, axis=-1), axis=-1)
  else:
    weight_GSK = jnp.take_along_axis(scores_GSE, expert_GSK, axis=-1)
  if weighting == Weighting.RENORMALIZED:
    weight_GSK = weight_GSK / jnp.sum(weight_GSK, axis=-1, keepdims=True)
  weight_GSK = jnp.where(kept_GSK, weight_GSK, 0.0)
  if weighting == Weighting.RENORMALIZED_AFTER_DROP:
    largest_GS1 = jnp.max(weight_GSK, axis=-1, keepdims=True)
    # A kept score may be tiny, and the derivative of a / b has b^2, which underflows to 0 / 0 below
    # 1e-19: scale by the largest first. The quotient does not depend on that scale.
    scale_GS1 = jnp.where(largest_GS1 > 0, largest_GS1, 1.0)
    weight_GSK = weight_GSK / jax.lax.stop_gradient(scale_GS1)
    total_GS1 = jnp.sum(weight_GSK, axis=-1, keepdims=True)
    # A token without experts divides 0 by 1: both value and gradient are 0.
    weight_GSK = weight_GSK / jnp.where(largest_GS1 > 0, total_GS1, 1.0)
  return weight_GSK
