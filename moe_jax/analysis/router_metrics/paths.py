"""Routing across layers: the paths of tokens through first choices, and how layers relate.

`first_choice` is (layers, ...) expert ids of the same tokens, in the order of the MoE layers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.router_metrics.arrays import count_pairs, full_mask
from moe_jax.analysis.router_metrics.information import (
  expected_mutual_information,
  mutual_information,
)
from moe_jax.errors import UserError

# Beyond e^37 paths a token no two tokens share one, to the precision of a float.
_MANY = 37.0


def path_counts(first_choice: np.ndarray, token_mask: np.ndarray | None = None) -> np.ndarray:
  """Counts the tokens on each path (e_1, ..., e_layers) that occurs: (paths,) int64.

  On the host: how many paths occur is not known beforehand.

  Raises:
    UserError: a mask that does not fit.
  """
  first_choice = np.asarray(first_choice)
  real = np.asarray(full_mask(token_mask, first_choice.shape[1:], "token_mask"))
  paths = first_choice[:, real].T
  return np.unique(paths, axis=0, return_counts=True)[1]


def path_diversity(counts: np.ndarray) -> float:
  """Returns distinct paths / tokens, in (0, 1]; 0 without tokens.

  Falls with the number of tokens, so compare equal numbers. At random: `expected_path_diversity`.
  """
  return len(counts) / max(int(np.sum(counts)), 1)


def expected_path_diversity(num_tokens: int, num_experts: int, num_layers: int) -> float:
  """Returns M (1 - (1 - 1/M)^N) / N for N tokens on M = E^layers equally likely paths."""
  log_paths = num_layers * math.log(num_experts)
  if log_paths > math.log(num_tokens) + _MANY:
    return 1.0
  # expm1 and log1p, since 1 - 1/M rounds to 1 for many paths.
  missed = num_tokens * math.log1p(-math.exp(-log_paths)) if log_paths else -math.inf
  return -math.expm1(missed) * math.exp(log_paths) / num_tokens


def path_entropy(counts: np.ndarray) -> float:
  """Returns the entropy of the paths in nats, at most ln N for N tokens."""
  shares = np.asarray(counts, np.float64) / max(np.sum(counts), 1)
  return float(-np.sum(shares * np.log(shares, where=shares > 0, out=np.zeros_like(shares))))


def transition_counts(
  first_choice: jax.Array, num_experts: int, token_mask: jax.Array | None = None
) -> jax.Array:
  """Counts tokens by their experts in each two adjacent MoE layers: (layers - 1, E, E) int32.

  Tables of several batches and devices add up; row i over its sum is P(e_{l+1} | e_l = i).

  Raises:
    UserError: fewer than two layers, a mask that does not fit, or, outside a compiled function, an
      id out of range.
  """
  if first_choice.shape[0] < 2:
    raise UserError(
      f"first_choice holds {first_choice.shape[0]} layers; expected at least 2 on its first axis"
    )
  real = full_mask(token_mask, first_choice.shape[1:], "token_mask")
  shape, names = (num_experts, num_experts), ("first_choice", "first_choice")
  tables = [
    count_pairs(here, after, shape, real, names)
    for here, after in zip(first_choice[:-1], first_choice[1:], strict=True)
  ]
  return jnp.stack(tables)


def cross_layer_information(transitions: jax.Array) -> jax.Array:
  """Returns I(e_l; e_{l+1}) in nats for each two adjacent layers: (layers - 1,) float32.

  From 0 (unrelated) to ln E (the next expert is known). The estimate is biased up:
  `expected_cross_layer_information`.

  Args:
    transitions: (layers - 1, E, E), from `transition_counts`.
  """
  return jax.vmap(mutual_information)(transitions)


def expected_cross_layer_information(num_tokens: int, num_experts: int) -> float:
  """Returns (E - 1)^2 / (2 N) nats, what unrelated layers show by bias alone."""
  return expected_mutual_information(num_experts, num_experts, num_tokens)
