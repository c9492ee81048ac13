"""How alike the experts of a layer are: by their weights, and by what they make of the same tokens.

Upcycling (arXiv 2212.05055) starts from E copies of one network: every similarity is 1. Means are
over the E (E - 1) pairs of different experts.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.analysis.router_metrics.arrays import ratio
from moe_jax.errors import UserError


def weight_similarity(weights: Any) -> jax.Array:
  """Returns the mean cosine between the flattened weights of two experts, a float32 scalar.

  Independent initialisations: about 0, with deviations of the order of 1 / sqrt(P) for P weights.

  Args:
    weights: a pytree whose arrays all have E as their first axis.

  Raises:
    UserError: fewer than two experts, or arrays that disagree on E.
  """
  leaves = jax.tree.leaves(weights)
  if len({leaf.shape[:1] for leaf in leaves}) != 1:
    raise UserError(
      f"weights have shapes {[leaf.shape for leaf in leaves]}; expected one first axis, E"
    )
  flat = [leaf.reshape(leaf.shape[0], -1).astype(jnp.float32) for leaf in leaves]
  return mean_off_diagonal(cosines(jnp.concatenate(flat, axis=1)))


def output_similarity(outputs: jax.Array) -> jax.Array:
  """Returns the mean linear CKA between the outputs of two experts, a float32 scalar.

  Independent experts: above 0 by D / tokens or so, so give many more tokens than D, and compare
  with the same tokens through random experts.

  Args:
    outputs: (E, tokens, D), every expert on the same tokens.

  Raises:
    UserError: fewer than two experts.
  """
  return mean_off_diagonal(linear_cka(outputs))


@jax.jit
def linear_cka(outputs: jax.Array) -> jax.Array:
  """Returns the linear CKA of every pair of representations: (E, E) float32 (arXiv 1905.00414).

  <K_i, K_j> / (|K_i| |K_j|) with K_i = X_i X_i^T and X_i centred over tokens, section 3 there.
  1 for outputs equal up to a shift, a rotation and one scale. Holds E * tokens^2 numbers.

  Args:
    outputs: (E, tokens, D).
  """
  outputs = outputs.astype(jnp.float32)
  centred = outputs - jnp.mean(outputs, axis=1, keepdims=True)
  grams = jnp.einsum("emd,end->emn", centred, centred, precision=jax.lax.Precision.HIGHEST)
  return cosines(grams.reshape(grams.shape[0], -1))


@jax.jit
def cosines(rows: jax.Array) -> jax.Array:
  """Returns the cosines of all pairs of rows (E, P): (E, E) float32; 0 for a row of zeros."""
  norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
  unit = ratio(rows, norms)
  return jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def mean_off_diagonal(table_EE: jax.Array) -> jax.Array:
  """Returns the mean of (E, E) over i != j.

  Raises:
    UserError: fewer than two experts, which have no pair.
  """
  E = table_EE.shape[0]
  if E < 2:
    raise UserError(f"similarity needs pairs of experts: {E} was given, expected at least 2")
  return jnp.sum(jnp.where(jnp.eye(E, dtype=bool), 0.0, table_EE)) / (E * (E - 1))
