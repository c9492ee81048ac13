"""What the place stage lost: dropped assignments, tokens that reached no expert, empty slots.

Papers say "token dropping" both for the fraction of assignments and for the fraction of tokens;
the two are equal only for K = 1. Here `asked` (..., K) marks the assignments that were wanted,
`kept` (..., K) those of them that got a slot.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.router_metrics.arrays import count_pairs, full_mask, ratio
from moe_jax.errors import UserError

# The bins in which expert choice routers report how many experts took a token.
EXPERTS_PER_TOKEN_BINS = ("0", "1", "2", "3-4", ">4")
_UPPER_EDGES = (0, 1, 2, 4)


@jax.jit
def dropped_assignment_fraction(asked: jax.Array, kept: jax.Array) -> jax.Array:
  """Returns 1 - sum kept / sum asked, a float32 scalar. At random: `expected_dropped_fraction`."""
  lost = asked & ~full_mask(kept, asked.shape, "kept")
  return ratio(jnp.sum(lost), jnp.sum(asked))


@jax.jit
def dropped_token_fraction(
  asked: jax.Array, kept: jax.Array, token_mask: jax.Array | None = None
) -> jax.Array:
  """Returns the fraction of real tokens that asked and got no slot at all, a float32 scalar.

  Args:
    asked, kept: (..., K) bool.
    token_mask: (...) bool, True = real token.
  """
  kept = full_mask(kept, asked.shape, "kept")
  real = full_mask(token_mask, asked.shape[:-1], "token_mask")
  lost = jnp.any(asked, axis=-1) & ~jnp.any(kept, axis=-1) & real
  return ratio(jnp.sum(lost), jnp.sum(real))


@jax.jit
def dropped_fraction_by_choice(asked: jax.Array, kept: jax.Array) -> jax.Array:
  """Returns (K,) float32, the dropped fraction of first choices, of second choices, ...

  Under choice-major order the last choices are dropped first.
  """
  lost = asked & ~full_mask(kept, asked.shape, "kept")
  axes = tuple(range(asked.ndim - 1))
  return ratio(jnp.sum(lost, axis=axes), jnp.sum(asked, axis=axes))


def expected_dropped_fraction(
  num_tokens: int, num_experts: int, capacity: int, top_k: int = 1
) -> float:
  """Returns the dropped fraction of a group of S tokens that choose experts at random.

  An expert is asked for by Binomial(S, K/E) tokens, of which those beyond C are dropped:
  E / (K S) * E[max(c - C, 0)], exactly. 2.3 % for 2,048 tokens, 8 experts and a capacity factor
  of 1; 7 % for 64 experts.

  Args:
    num_tokens: S, of one routing group.
    num_experts: E.
    capacity: C.
    top_k: K distinct experts a token.
  """
  if top_k == num_experts:
    return max(num_tokens - capacity, 0) / num_tokens
  share = top_k / num_experts
  load = np.arange(num_tokens + 1)
  excess = np.maximum(load - capacity, 0)
  return float(excess @ _binomial(num_tokens, share)) / (num_tokens * share)


def capacity_utilization(num_kept: jax.Array, num_slots: jax.Array) -> jax.Array:
  """Returns the filled fraction of all G * E * C slots; 1 minus it is padding."""
  return ratio(num_kept, num_slots)


def experts_per_token(token: jax.Array, valid: jax.Array, num_tokens: int) -> jax.Array:
  """Counts the experts that took each token, for plans in any order: (G, S) int32.

  Args:
    token: (G, N) token index of each assignment in its group, as in a `RoutingPlan`.
    valid: (G, N) bool, True where the assignment has a slot.
    num_tokens: S.

  Raises:
    UserError: a mask that does not fit, or an index out of range outside a compiled function.
  """
  groups = jnp.broadcast_to(jnp.arange(token.shape[0])[:, None], token.shape)
  valid = full_mask(valid, token.shape, "valid")
  return count_pairs(groups, token, (token.shape[0], num_tokens), valid, ("group", "token"))


@jax.jit
def experts_per_token_histogram(
  counts: jax.Array, token_mask: jax.Array | None = None
) -> jax.Array:
  """Counts real tokens by how many experts took them, in `EXPERTS_PER_TOKEN_BINS`: (5,) int32.

  Expert choice leaves this to the router (arXiv 2202.09368). The first bin over the sum of all is
  the fraction of unrouted tokens, at random `expected_unrouted_fraction`.

  Args:
    counts: (...) integers, as from `experts_per_token`.
    token_mask: (...) bool, True = real token.
  """
  real = full_mask(token_mask, counts.shape, "token_mask")
  bins = jnp.searchsorted(jnp.array(_UPPER_EDGES), counts)
  hot = jax.nn.one_hot(bins, len(EXPERTS_PER_TOKEN_BINS), dtype=jnp.int32)
  return jnp.sum(hot * real[..., None], axis=tuple(range(counts.ndim)))


def unrouted_fraction(counts: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
  """Returns the fraction of real tokens that no expert took, a float32 scalar."""
  histogram = experts_per_token_histogram(counts, token_mask)
  return ratio(histogram[0], jnp.sum(histogram))


def expected_unrouted_fraction(num_tokens: int, num_experts: int, capacity: int) -> float:
  """Returns (1 - C/S)^E: every expert picks C of S tokens at random, and none picks this one.

  Raises:
    UserError: more slots than tokens.
  """
  if capacity > num_tokens:
    raise UserError(f"capacity = {capacity} is refused: it must be at most S = {num_tokens}")
  return (1.0 - capacity / num_tokens) ** num_experts


def _binomial(n: int, p: float) -> np.ndarray:
  """Returns (n + 1,) probabilities of 0 to n successes, 0 < p < 1."""
  factorial = np.array([math.lgamma(i + 1.0) for i in range(n + 1)])
  k = np.arange(n + 1)
  log_choose = factorial[n] - factorial - factorial[::-1]
  return np.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p))
