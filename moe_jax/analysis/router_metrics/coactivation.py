"""Which experts work together: tables of pairs that add up, and the fractions made of them."""

import enum

import jax
import jax.numpy as jnp

from moe_jax.analysis.router_metrics.arrays import count_pairs, expert_sets, full_mask, ratio
from moe_jax.choices import as_choice


class Pairs(enum.StrEnum):
  """Which pairs among a token's K experts are counted."""

  ALL = "all"  # every pair, as the paper's formula
  ADJACENT_RANKS = "adjacent_ranks"  # only choices j and j + 1, as OLMoE's released analysis


def coactivation_counts(
  expert: jax.Array,
  num_experts: int,
  asked: jax.Array | None = None,
  pairs: Pairs = Pairs.ALL,
) -> jax.Array:
  """Counts tokens by pairs of experts: (E, E) int32, symmetric; the diagonal is N_i.

  Tables of several batches and devices add up.

  Args:
    expert: (..., K) expert ids, best first, distinct for a token.
    num_experts: E.
    asked: (..., K) bool, False for padding and choices that were not made.
    pairs: `adjacent_ranks` is what `scripts/run_moe_analysis.py` of allenai/OLMoE counts; it
      misses most pairs for K > 2.

  Raises:
    UserError: a mask that does not fit, or an id out of range outside a compiled function.
  """
  asked = full_mask(asked, expert.shape, "asked")
  alone = _count(expert, expert, num_experts, asked)
  if as_choice(Pairs, "pairs", pairs) == Pairs.ADJACENT_RANKS:
    both = asked[..., 1:] & asked[..., :-1]
    following = _count(expert[..., :-1], expert[..., 1:], num_experts, both)
    return alone + following + following.T
  sets = expert_sets(expert, num_experts, asked).reshape(-1, num_experts).astype(jnp.int32)
  return jnp.where(jnp.eye(num_experts, dtype=bool), alone, sets.T @ sets)


@jax.jit
def coactivation(counts_EE: jax.Array) -> jax.Array:
  """Returns Coact(i, j) = N_ij / N_i, (E, E) with a diagonal of 0 (arXiv 2409.02060 Eq. 6).

  Of the tokens that activate expert i, the fraction that activate j too; not symmetric. With all
  pairs every row sums to K - 1, with adjacent ranks to at most 2. Experts never asked for have
  rows of 0. At random: `expected_coactivation`.

  Args:
    counts_EE: from `coactivation_counts`.
  """
  fractions = ratio(counts_EE, jnp.diagonal(counts_EE)[:, None])
  return jnp.where(jnp.eye(counts_EE.shape[0], dtype=bool), 0.0, fractions)


def expected_coactivation(num_experts: int, top_k: int) -> float:
  """Returns (K - 1) / (E - 1): two given experts of a token that has the first, at random."""
  return (top_k - 1) / max(num_experts - 1, 1)


def _count(rows, columns, num_experts: int, mask) -> jax.Array:
  shape = (num_experts, num_experts)
  return count_pairs(rows, columns, shape, mask, ("expert", "expert"))
