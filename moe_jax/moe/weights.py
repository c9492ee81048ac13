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
    total_GS1 = jnp.sum(weight_GSK, axis=-1, keepdims=True)
    # The inner where keeps the gradient of a token without experts at 0 instead of NaN.
    weight_GSK = jnp.where(total_GS1 > 0, weight_GSK / jnp.where(total_GS1 > 0, total_GS1, 1.0), 0.0)
  return weight_GSK
