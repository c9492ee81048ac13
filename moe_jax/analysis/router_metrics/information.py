"""Entropy, mutual information and divergence of distributions over experts, in nats.

Every function takes nonnegative weights (counts or probabilities) and scales them to sum to 1, so
that tables of counts, which add up over batches and devices, can be given as they are.
"""

import jax
import jax.numpy as jnp

from moe_jax.analysis.router_metrics.arrays import ratio


def distribution(weights: jax.Array, axis: int = -1) -> jax.Array:
  """Returns float32 weights scaled to sum to 1 over `axis`; zeros where all are zero."""
  weights = jnp.asarray(weights, jnp.float32)
  return ratio(weights, jnp.sum(weights, axis=axis, keepdims=True))


def entropy(weights: jax.Array, axis: int = -1) -> jax.Array:
  """Returns H = -sum p ln p over `axis`, with 0 ln 0 = 0. One-hot: 0. Uniform over n: ln n."""
  return jnp.sum(jax.scipy.special.entr(distribution(weights, axis)), axis=axis)


def mutual_information(joint: jax.Array) -> jax.Array:
  """Returns I(X; Y) = sum p_xy ln(p_xy / (p_x p_y)) of a joint table (X, Y).

  The plug-in estimate, biased upwards: of independent X and Y it is not 0 but about
  `expected_mutual_information`.
  """
  joint = jnp.asarray(joint, jnp.float32)
  joint = ratio(joint, jnp.sum(joint))
  x = jnp.sum(joint, axis=1, keepdims=True)
  y = jnp.sum(joint, axis=0, keepdims=True)
  # Term by term, since H(X) + H(Y) - H(XY) cancels when the information is small.
  return jnp.sum(jax.scipy.special.rel_entr(joint, x @ y))


def expected_mutual_information(num_x: int, num_y: int, num_samples: int) -> float:
  """Returns the plug-in estimate of independent X and Y: (X - 1)(Y - 1) / (2 N) nats.

  The leading term of the bias (Miller 1955), good for N well above X * Y.
  """
  return (num_x - 1) * (num_y - 1) / (2.0 * num_samples)


def jensen_shannon_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
  """Returns (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, over the last axis (Lin 1991).

  Equal distributions: 0. Disjoint ones: ln 2.
  """
  p, q = distribution(p), distribution(q)
  middle = (p + q) / 2
  to_middle = jax.scipy.special.rel_entr(p, middle) + jax.scipy.special.rel_entr(q, middle)
  return jnp.sum(to_middle, axis=-1) / 2
