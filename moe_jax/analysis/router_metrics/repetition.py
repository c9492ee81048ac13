"""How often consecutive tokens meet the same experts (Mixtral, arXiv 2401.04088 Table 5)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.router_metrics.arrays import full_mask, ratio
from moe_jax.analysis.router_metrics.information import distribution
from moe_jax.errors import UserError


@jax.jit
def repetition_counts(
  expert_BLK: jax.Array,
  token_mask: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Counts in each row the pairs (t, t + 1) that share an expert, and all pairs.

  With first choices `[..., :1]` a pair repeats if they are equal; with all K if the two sets meet
  (the paper's "first or second choice" for K = 2).

  Args:
    expert_BLK: (B, L, K) expert ids.
    token_mask: (B, L) bool, True = real token.
    segment_ids: (B, L) packed documents; pairs of two documents are not counted.

  Returns:
    repeats (B,) and pairs (B,), int32; sums over rows give `repetition`, the rows themselves
    `repetition_interval`.

  Raises:
    UserError: shapes that do not fit.
  """
  B, L, _ = expert_BLK.shape
  real_BL = full_mask(token_mask, (B, L), "token_mask")
  pair = real_BL[:, 1:] & real_BL[:, :-1]
  if segment_ids is not None:
    if segment_ids.shape != (B, L):
      raise UserError(f"segment_ids have shape {segment_ids.shape}; expected {(B, L)}")
    pair &= segment_ids[:, 1:] == segment_ids[:, :-1]
  equal = expert_BLK[:, 1:, :, None] == expert_BLK[:, :-1, None, :]
  repeats = jnp.any(equal, axis=(2, 3)) & pair
  return jnp.sum(repeats, axis=1, dtype=jnp.int32), jnp.sum(pair, axis=1, dtype=jnp.int32)


def repetition(repeats_B: jax.Array, pairs_B: jax.Array) -> jax.Array:
  """Returns the fraction of consecutive pairs that share an expert, a float32 scalar.

  At random with balanced experts: `expected_repetition`.
  """
  return ratio(jnp.sum(repeats_B), jnp.sum(pairs_B))


def expected_repetition(num_experts: int, top_k: int = 1) -> float:
  """Returns 1 - C(E - K, K) / C(E, K): two independent sets of K of E experts meet.

  1/E for K = 1; 46.4 % for K = 2 of 8.
  """
  return 1.0 - math.comb(num_experts - top_k, top_k) / math.comb(num_experts, top_k)


def load_repetition(counts_E: jax.Array) -> jax.Array:
  """Returns sum_e f_e^2: how often first choices repeat by unequal load alone, (...).

  Args:
    counts_E: (..., E) counts of first choices.
  """
  return jnp.sum(jnp.square(distribution(counts_E)), axis=-1)


def repetition_lift(observed: jax.Array, baseline: jax.Array) -> jax.Array:
  """Returns observed / baseline: 1 where consecutive tokens are routed independently.

  The baseline of first choices is `load_repetition`, since imbalance alone repeats; with it a lift
  above 1 is due to the order of the tokens.
  """
  return ratio(observed, baseline)


def repetition_interval(
  repeats_B: np.ndarray,
  pairs_B: np.ndarray,
  *,
  seed: int,
  confidence: float = 0.95,
  draws: int = 1000,
) -> tuple[float, float]:
  """Returns a percentile bootstrap interval of `repetition` that draws whole rows anew.

  Rows, not pairs: pairs of one text are not independent.

  Raises:
    UserError: no row has a pair, or `confidence` is not in (0, 1).
  """
  repeats_B, pairs_B = np.asarray(repeats_B), np.asarray(pairs_B)
  repeats_B, pairs_B = repeats_B[pairs_B > 0], pairs_B[pairs_B > 0]
  if not pairs_B.size:
    raise UserError("pairs_B holds no pair; expected at least one row with two real tokens")
  if not 0 < confidence < 1:
    raise UserError(f"confidence = {confidence} is refused: it must be in (0, 1), such as 0.95")
  rows = np.random.default_rng(seed).integers(0, len(pairs_B), (draws, len(pairs_B)))
  samples = repeats_B[rows].sum(axis=1) / pairs_B[rows].sum(axis=1)
  low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
  return float(low), float(high)
