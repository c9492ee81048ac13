"""Weigh stage: scores of the selected experts -> combine weights in float32."""

import jax
import jax.numpy as jnp

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import Weighting


def weigh(
  scores_GSE: jax.Array,
  logits_GSE: jax.Array,
  expert_GSK: jax.Array,
  kept_GSK: jax.Array,
  config: RoutingConfig,
) -> jax.Array:
  """Returns the combine weights (G, S, K) float32, 0 where `kept_GSK` is False.

  Args:
    scores_GSE, logits_GSE: (G, S, E') float32.
    expert_GSK: (G, S, K) int32, the experts asked for.
    kept_GSK: (G, S, K) bool, the assignments that have a slot (or are null experts).
    config: `weighting`, `weight_norm_order` and `weight_scale` are read. `renormalized` divides by
      the norm over the selected experts, whether they were used and kept or not (GShard
      Algorithm 1 normalises first); `renormalized_after_drop` by the norm over the kept ones.
  """
  weight_GSK = _before_drops(scores_GSE, logits_GSE, expert_GSK, config)
  weight_GSK = jnp.where(kept_GSK, weight_GSK, 0.0)
  if config.weighting == Weighting.RENORMALIZED_AFTER_DROP:
    weight_GSK = normalize(weight_GSK, config.weight_norm_order)
  return weight_GSK * config.weight_scale


def _before_drops(scores_GSE, logits_GSE, expert_GSK, config):
  if config.weighting == Weighting.SOFTMAX_SELECTED:
    if config.selection == "hierarchical":
      return _softmax_of_both_levels(logits_GSE, expert_GSK, config)
    return jax.nn.softmax(jnp.take_along_axis(logits_GSE, expert_GSK, axis=-1), axis=-1)
  weight_GSK = jnp.take_along_axis(scores_GSE, expert_GSK, axis=-1)
  if config.weighting == Weighting.RENORMALIZED:
    return normalize(weight_GSK, config.weight_norm_order)
  return discrete(weight_GSK, config.weighting)


def discrete(weight: jax.Array, weighting: Weighting) -> jax.Array:
  """Replaces weights by 1 under `hard`, keeping their gradient under `straight_through`."""
  if weighting == Weighting.HARD:
    return jnp.ones_like(weight)
  if weighting == Weighting.STRAIGHT_THROUGH:
    # Exactly 1 forward: 1 + weight - weight would round.
    return jnp.ones_like(weight) + (weight - jax.lax.stop_gradient(weight))
  return weight


def normalize(weight_GSK: jax.Array, order: float) -> jax.Array:
  """Divides non-negative weights by their norm over the last axis; if all are 0 they stay 0."""
  largest_GS1 = jnp.max(weight_GSK, axis=-1, keepdims=True)
  # A weight may be tiny, and the derivative of a / b has b^2, which underflows to 0 / 0 below
  # 1e-19: scale by the largest first. The quotient does not depend on that scale.
  positive_GS1 = largest_GS1 > 0
  scaled_GSK = weight_GSK / jax.lax.stop_gradient(jnp.where(positive_GS1, largest_GS1, 1.0))
  if order == 1.0:
    norm_GS1 = jnp.sum(scaled_GSK, axis=-1, keepdims=True)
  else:
    # x^p has an infinite derivative at 0 for p < 1, and 0^p none that autodiff finds.
    safe_GSK = jnp.where(scaled_GSK > 0, scaled_GSK, 1.0)
    powers_GSK = jnp.where(scaled_GSK > 0, safe_GSK**order, 0.0)
    total_GS1 = jnp.sum(powers_GSK, axis=-1, keepdims=True)
    norm_GS1 = jnp.where(positive_GS1, total_GS1, 1.0) ** (1.0 / order)
  # A token without weights divides 0 by 1: both value and gradient are 0.
  return scaled_GSK / jnp.where(positive_GS1, norm_GS1, 1.0)


def _softmax_of_both_levels(logits_GSE, expert_GSK, config):
  """Returns G_first(x)_i * G_second(x)_ij, each a softmax over what it kept (1701.06538 Eq. 12)."""
  E, gates = config.num_experts, config.top_expert_groups
  size = E // config.num_expert_groups
  expert_GSAB = expert_GSK.reshape(*expert_GSK.shape[:-1], gates, -1)
  flat = logits_GSE[..., :E]
  inner_GSAB = jnp.take_along_axis(flat, expert_GSK, axis=-1).reshape(expert_GSAB.shape)
  gate_GSA = expert_GSAB[..., 0] // size
  outer_GSA = jnp.take_along_axis(logits_GSE[..., E:], gate_GSA, axis=-1)
  weight = jax.nn.softmax(outer_GSA, axis=-1)[..., None] * jax.nn.softmax(inner_GSAB, axis=-1)
  return weight.reshape(expert_GSK.shape)
