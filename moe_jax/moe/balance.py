"""Balancing by rule: the selection bias and the adaptive coefficient of the balance loss.

Both follow what a whole optimiser step routed, once a step, and receive no gradient. Only real
tokens count, and only real experts are balanced: null experts keep a bias of 0.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import BiasUpdate
from moe_jax.sharding.local import row_top_k

# Repeated multiplication must end neither at 0, which no factor leaves again, nor at infinity.
_SCALE_RANGE = (1e-12, 1e12)


def update_bias(bias: jax.Array, load: jax.Array, config: RoutingConfig) -> jax.Array:
  """Returns the selection bias (E') float32 after a step of the `sign` or `magnitude` rule.

  `sign` adds rate * sign(mean load - load) (arXiv 2408.15664 Algorithm 1), `magnitude` adds
  rate * (1 - load / mean load) (the same paper, section 4.3, with loads relative to their mean, so
  that the rate does not depend on the batch). The bias is not centred. A step that routed nothing
  changes nothing.

  Args:
    bias: (E') float32; entries from E on, those of null experts, stay as they are.
    load: (E,) float32 whole numbers, assignments that asked for each expert in the step.
    config: `bias_update` and `bias_rate` are read.
  """
  mean = jnp.mean(load)
  if config.bias_update == BiasUpdate.SIGN:
    change = jnp.sign(mean - load)
  else:
    change = jnp.where(mean > 0, 1.0 - load / jnp.where(mean > 0, mean, 1.0), 0.0)
  return bias.at[: load.shape[0]].add(config.bias_rate * change)


def quantile_bias(
  scores_GSE: jax.Array,
  ranking_GSE: jax.Array,
  mask_GS: jax.Array,
  asked: jax.Array,
  config: RoutingConfig,
) -> jax.Array:
  """Returns the bias (E,) float32 that would give every expert its share of these tokens.

  The dual update of Megatron-LM's quantile balancing (`qb_dual_update`): with alpha_t the (K+1)-th
  largest of a token's biased scores, which an expert must exceed to be selected, the bias of e
  becomes minus the (n+1)-th largest margin s_te - alpha_t, so that exactly n tokens exceed it.
  n = floor(K T / E), T real tokens; n is smaller where fewer real experts are asked for (null
  experts, a second expert that is not asked), and T - 1 where every token asks every real expert.

  Exact for the tokens of one call. Margins of a whole step would be as large as its router
  logits, so over microbatches the biases are averaged, weighted by real tokens; Megatron-LM
  averages too, without weights.

  Args:
    scores_GSE: (G, S, E') float32 without bias.
    ranking_GSE: (G, S, E') float32, scores plus bias.
    mask_GS: (G, S) bool, True = real token; without one the result is 0.
    asked: scalar, assignments of real tokens to real experts.
    config: `num_experts` and `top_k` are read.
  """
  E, K = config.num_experts, config.top_k
  alpha_GS1 = row_top_k(ranking_GSE, K + 1)[0][..., K:]
  margin_GSE = jnp.where(mask_GS[..., None], scores_GSE[..., :E] - alpha_GS1, -jnp.inf)
  ascending = jnp.sort(margin_GSE.reshape(-1, E), axis=0)
  # There are T margins: an (T+1)-th largest would be that of padding, minus infinity.
  share = jnp.minimum(asked.astype(jnp.int32) // E, jnp.maximum(jnp.sum(mask_GS) - 1, 0))
  quantile = jnp.take(ascending, ascending.shape[0] - 1 - share, axis=0)
  return jax.lax.stop_gradient(jnp.where(jnp.any(mask_GS), -quantile, 0.0))


def update_balance_scale(scale: jax.Array, measured: jax.Array, config: RoutingConfig) -> jax.Array:
  """Returns the factor of the balance loss's coefficient, float32, for the next step.

  scale * adaptive_factor ** sign(measured - adaptive_target) (ReMoE, arXiv 2412.14711 Eq. 9, there
  in terms of sparsity), kept within 1e-12 and 1e12.

  Args:
    scale: float32 scalar.
    measured: float32 scalar of the step: mean experts asked for per token (`positive`) or max
      violation (all other selections).
    config: `adaptive_target` and `adaptive_factor` are read.
  """
  exponent = jnp.sign(measured - config.adaptive_target)
  return jnp.clip(scale * config.adaptive_factor**exponent, *_SCALE_RANGE)
