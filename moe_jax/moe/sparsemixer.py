"""SparseMixer-v2 routing of GRIN and Phi-3.5-MoE (arXiv 2409.12136 section 2.1, 2310.00811)."""

import jax
import jax.numpy as jnp

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.registry import SelectView, TokenChoice, register_selection


@register_selection("sparsemixer", draws=True)
def sparsemixer(view: SelectView, config: RoutingConfig) -> TokenChoice:
  """Picks K experts one after the other, each by a softmax over the logits near the best.

  Logits further below the largest of what is left than twice `sparsemixer_epsilon`, relative to the
  larger magnitude, are out of reach. Training samples among the rest and estimates the gradient of
  that discrete choice with Heun's third-order method; outside training the largest is taken. A
  weight is the sampled expert's probability among those within reach; weights do not sum to 1.
  """
  keys = jax.random.split(view.key, config.top_k) if view.train else [None] * config.top_k
  experts, weights = [], []
  left_GSE = jnp.zeros(view.logits.shape, bool)
  for key in keys:
    expert_GS, weight_GS = _pick(view.logits, left_GSE, 2 * config.sparsemixer_epsilon, key)
    left_GSE |= jax.nn.one_hot(expert_GS, view.logits.shape[-1], dtype=bool)
    experts.append(expert_GS)
    weights.append(weight_GS)
  expert_GSK = jnp.stack(experts, axis=-1).astype(jnp.int32)
  return TokenChoice(expert_GSK, jnp.ones(expert_GSK.shape, bool), jnp.stack(weights, axis=-1))


def _pick(logits_GSE, taken_GSE, threshold, key):
  """Returns one expert (G, S) and its weight (G, S)."""
  open_GSE = jnp.where(taken_GSE, -jnp.inf, logits_GSE)
  best_GS1 = jnp.max(open_GSE, axis=-1, keepdims=True)
  scale_GSE = jnp.maximum(jnp.abs(logits_GSE), best_GS1)
  far_GSE = (best_GS1 - logits_GSE) > threshold * scale_GSE
  reach_GSE = jax.lax.stop_gradient(~far_GSE & ~taken_GSE)
  # -1e30 rather than -inf: the softmax of a masked logit must have a gradient of 0, not NaN.
  masked_GSE = jnp.where(reach_GSE, logits_GSE, -1e30)
  probs_GSE = jax.nn.softmax(masked_GSE, axis=-1)
  best_GS = jnp.argmax(masked_GSE, axis=-1)
  if key is None:
    return best_GS, jnp.take_along_axis(probs_GSE, best_GS[..., None], axis=-1)[..., 0]
  sample_key, heun_key = jax.random.split(key)
  expert_GS = jax.random.categorical(sample_key, jax.lax.stop_gradient(masked_GSE))
  probability_GS = jnp.take_along_axis(probs_GSE, expert_GS[..., None], axis=-1)[..., 0]
  # Heun: half-way evaluations are drawn with probability 3/4 where the sample is not the mode,
  # and scale the output to a third while the gradient stays that of the full weight.
  full_GS = (expert_GS == best_GS) | (jax.random.uniform(heun_key, best_GS.shape) > 0.75)
  return expert_GS, _scale_value(probability_GS, jnp.where(full_GS, 1.0, 1.0 / 3.0))


@jax.custom_jvp
def _scale_value(weight, factor):
  """Returns weight * factor, with the derivative of weight."""
  return weight * factor


@_scale_value.defjvp
def _scale_value_jvp(primals, tangents):
  return _scale_value(*primals), tangents[0]
