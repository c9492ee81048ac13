"""Entropy, mutual information and divergence of distributions over experts, in nats.

Every function takes nonnegative weights (counts or probabilities) and scales them to sum to 1, so
that tables of counts, which add up over batches and devices, can be given as they are.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.analysis.router_metrics.arrays import ratio


@functools.partial(jax.jit, static_argnames="axis")
def distribution(weights: jax.Array, axis: int = -1) -> jax.Array:
  """Returns float32 weights scaled to sum to 1 over `axis`; zeros where all are zero."""
  weights = jnp.asarray(weights, jnp.float32)
  return ratio(weights, jnp.sum(weights, axis=axis, keepdims=True))


@functools.partial(jax.jit, static_argnames="axis")
def entropy(weights: jax.Array, axis: int = -1) -> jax.Array:
  """Returns H = -sum p ln p over `axis`, with 0 ln 0 = 0. One-hot: 0. Uniform over n: ln n."""
  p = distribution(weights, axis)
  return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)), axis=axis)


def relative_entropy(p: jax.Array, q: jax.Array) -> jax.Array:
  """Returns KL(p || q) = sum p ln(p / q) over the last axis; q must be above 0 where p is."""
  some = p > 0
  return jnp.sum(p * jnp.log(jnp.where(some, p, 1.0) / jnp.where(some, q, 1.0)), axis=-1)


@jax.jit
def mutual_information(joint: jax.Array) -> jax.Array:
  """Returns I(X; Y) = sum p_xy ln(p_xy / (p_x p_y)) of a joint table (X, Y).

  The plug-in estimate, biased upwards: of independent X and Y it is not 0 but about
  `expected_mutual_information`.
  """
  joint = jnp.asarray(joint, jnp.float32)
  joint = ratio(joint, jnp.sum(joint))
  x, y = jnp.sum(joint, axis=1, keepdims=True), jnp.sum(joint, axis=0, keepdims=True)
  # Not H(X) + H(Y) - H(XY), which cancels when the information is small.
  return jnp.sum(relative_entropy(joint, x * y))


def expected_mutual_information(num_x: int, num_y: int, num_samples: int) -> float:
  """Returns the plug-in estimate of independent X and Y: (X - 1)(Y - 1) / (2 N) nats.

  The leading term of the bias (Miller 1955), good for N well above X * Y.
  """
  return (num_x - 1) * (num_y - 1) / (2.0 * num_samples)


@jax.jit
def jensen_shannon_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
  """Returns (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, over the last axis (Lin 1991).

  Equal distributions: 0. Disjoint ones: ln 2.
  """
  p, q = distribution(p), distribution(q)
  middle = (p + q) / 2
  return (relative_entropy(p, middle) + relative_entropy(q, middle)) / 2
