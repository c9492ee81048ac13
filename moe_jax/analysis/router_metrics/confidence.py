"""How sure the router is: probabilities (..., E) and logits (..., E) of real tokens, float32.

Probabilities sum to 1 over E. Scores that do not (sigmoid, ReLU) are scaled for the metrics by
`as_probabilities`. Give them as the router computed them before jitter or noise.
"""

import math

import jax
import jax.numpy as jnp

from moe_jax.analysis.router_metrics.arrays import full_mask, masked_mean
from moe_jax.analysis.router_metrics.information import distribution, entropy, relative_entropy
from moe_jax.moe.losses import router_z_loss
from moe_jax.moe.options import LossPadding


def as_probabilities(scores_E: jax.Array) -> jax.Array:
  """Scales nonnegative scores (..., E) to sum to 1; zeros where all are zero."""
  return distribution(scores_E)


def router_confidence(probs_E: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
  """Returns the mean over real tokens of max_e p_te. Uniform probabilities: 1/E."""
  return _mean_over_tokens(jnp.max(probs_E, axis=-1), token_mask)


def top_k_mass(probs_E: jax.Array, top_k: int, token_mask: jax.Array | None = None) -> jax.Array:
  """Returns the mean over real tokens of the sum of the K largest p_te. Uniform: K/E."""
  largest, _ = jax.lax.top_k(probs_E, top_k)
  return _mean_over_tokens(jnp.sum(largest, axis=-1), token_mask)


def top_margin(probs_E: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
  """Returns the mean over real tokens of the largest less the second largest p_te. Uniform: 0.

  A single expert has no second: 1.
  """
  return _mean_over_tokens(margin_of_tokens(probs_E), token_mask)


@jax.jit
def margin_of_tokens(probs_E: jax.Array) -> jax.Array:
  """Returns (...) float32, the largest less the second largest probability of each token."""
  if probs_E.shape[-1] == 1:
    return probs_E[..., 0]
  largest, _ = jax.lax.top_k(probs_E, 2)
  return largest[..., 0] - largest[..., 1]


@jax.jit
def token_entropy(probs_E: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
  """Returns H(E|t) = mean_t H(p_t) in nats. Uniform: ln E. Certain: 0.

  The local entropy of LIMoE (arXiv 2206.02770) of one modality.
  """
  return _mean_over_tokens(entropy(probs_E), token_mask)


@jax.jit
def expert_entropy(probs_E: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
  """Returns H(E) = H(mean_t p_t) in nats. Balanced: ln E.

  The global entropy of LIMoE (arXiv 2206.02770) of one modality.
  """
  return entropy(_mean_probabilities(probs_E, token_mask))


@jax.jit
def routing_information(probs_E: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
  """Returns I(t; E) = H(E) - H(E|t) in nats: high if the router is both sure and balanced.

  Mod-Squad (arXiv 2212.08066) trains on it. From 0 (every token alike) to ln E. Computed as the
  mean of KL(p_t || mean p), which does not cancel when it is small.
  """
  probs_E = distribution(probs_E)
  mean_E = _mean_probabilities(probs_E, token_mask)
  divergence = relative_entropy(probs_E, jnp.broadcast_to(mean_E, probs_E.shape))
  return _mean_over_tokens(divergence, token_mask)


def normalized_routing_information(
  probs_E: jax.Array, token_mask: jax.Array | None = None
) -> jax.Array:
  """Returns `routing_information` / ln E, from 0 to 1; 0 for a single expert."""
  return routing_information(probs_E, token_mask) / math.log(max(probs_E.shape[-1], 2))


@jax.jit
def max_abs_logit(logits_E: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
  """Returns max |z| over real tokens and experts; 0 without a token.

  Large logits make the softmax insensitive and bfloat16 coarse (arXiv 2202.08906 section 3). It is
  a maximum: over devices take pmax, not psum.
  """
  real = full_mask(token_mask, logits_E.shape[:-1], "token_mask")
  magnitude = jnp.where(real[..., None], jnp.abs(logits_E.astype(jnp.float32)), 0.0)
  return jnp.max(magnitude, initial=0.0)


@jax.jit
def mean_squared_logsumexp(logits_E: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
  """Returns mean_t logsumexp(z_t)^2, the z-loss (arXiv 2202.08906 Eq. 5). Zero logits: (ln E)^2.

  Worth logging also where its coefficient is 0.
  """
  real = full_mask(token_mask, logits_E.shape[:-1], "token_mask")
  logits_E = jnp.where(real[..., None], logits_E, 0.0)
  return router_z_loss(logits_E, real, LossPadding.EXCLUDE)


def _mean_over_tokens(values: jax.Array, token_mask: jax.Array | None) -> jax.Array:
  return masked_mean(values, full_mask(token_mask, values.shape, "token_mask"))


def _mean_probabilities(probs_E: jax.Array, token_mask: jax.Array | None) -> jax.Array:
  real = full_mask(token_mask, probs_E.shape[:-1], "token_mask")
  kept = jnp.where(real[..., None], probs_E.astype(jnp.float32), 0.0)
  return distribution(jnp.sum(kept, axis=tuple(range(kept.ndim - 1))))
