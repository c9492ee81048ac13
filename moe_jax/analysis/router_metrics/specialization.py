"""What experts specialise in: domains of text, and words of the vocabulary.

Both start from a table of counts, one row a label (a domain or a token id), which adds up over
batches and devices: `label_counts`. OLMoE (arXiv 2409.02060) defines them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.router_metrics.arrays import count_ids, count_pairs, full_mask, ratio
from moe_jax.analysis.router_metrics.information import (
  entropy,
  jensen_shannon_divergence,
  mutual_information,
)
from moe_jax.errors import UserError
from moe_jax.moe.metrics import max_violation_floor

# The largest of E shares is biased up in a small sample: from one token it is always 1.
MIN_TOKEN_COUNT = 10


def label_counts(
  expert: jax.Array,
  label: jax.Array,
  num_experts: int,
  num_labels: int,
  asked: jax.Array | None = None,
) -> jax.Array:
  """Counts assignments by the label of their token and by expert: (labels, E) int32.

  Args:
    expert: (..., K) expert ids; for first choices alone `[..., :1]`.
    label: (...) integers below `num_labels`: the domain of each token, or its id, or the id of the
      token after it, in the text or as predicted.
    num_experts: E.
    num_labels: number of labels, for token ids V.
    asked: (..., K) bool, False for padding and choices that were not made.

  Raises:
    UserError: shapes that do not fit, or an id out of range outside a compiled function.
  """
  if label.shape != expert.shape[:-1]:
    raise UserError(f"label has shape {label.shape}; expected {expert.shape[:-1]}, one a token")
  labels = jnp.broadcast_to(label[..., None], expert.shape)
  asked = full_mask(asked, expert.shape, "asked")
  return count_pairs(labels, expert, (num_labels, num_experts), asked, ("label", "expert"))


def label_tokens(
  label: jax.Array, num_labels: int, token_mask: jax.Array | None = None
) -> jax.Array:
  """Counts the real tokens of each label: (labels,) int32.

  Raises:
    UserError: as `label_counts`.
  """
  return count_ids(label, num_labels, full_mask(token_mask, label.shape, "token_mask"), "label")


def domain_specialization(counts: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns Spec(i, D) = N_iD / N_D, (domains, E) float32 (arXiv 2409.02060 Eq. 7).

  The fraction of a domain's tokens that go to expert i; a row sums to K. At random:
  `expected_specialization`. A domain without tokens has a row of 0.

  Args:
    counts: (domains, E) assignments, from `label_counts`.
    tokens: (domains,) tokens, from `label_tokens`.
  """
  return ratio(counts, tokens[:, None])


def expected_specialization(num_experts: int, top_k: int) -> float:
  """Returns K/E, the domain specialisation of a router that ignores its input."""
  return top_k / num_experts


def specialization_deviation(specialization: jax.Array, top_k: int) -> jax.Array:
  """Returns the mean over domains and experts of |Spec - K/E|, a float32 scalar. At random: ~0."""
  uniform = expected_specialization(specialization.shape[-1], top_k)
  return jnp.mean(jnp.abs(specialization - uniform))


@jax.jit
def domain_divergence(counts: jax.Array) -> jax.Array:
  """Returns the Jensen-Shannon divergence of every pair of domains: (domains, domains), nats.

  Between the distributions over experts of two domains, (domains, E) counts. At random ~0; domains
  that share no expert: ln 2.
  """
  return jensen_shannon_divergence(counts[:, None, :], counts[None, :, :])


@jax.jit
def domain_information(counts: jax.Array) -> jax.Array:
  """Returns I(D; E) / H(D), from 0 (experts tell nothing of the domain) to 1, a float32 scalar.

  Of (domains, E) counts of assignments; 0 for a single domain. The estimate is biased up:
  `expected_domain_information`.
  """
  return ratio(mutual_information(counts), entropy(jnp.sum(counts, axis=1)))


def expected_domain_information(counts: np.ndarray) -> float:
  """Returns what `domain_information` shows, by bias alone, of counts without any relation.

  (domains - 1)(E - 1) / (2 N H(D)) with N the assignments counted (Miller 1955).
  """
  counts = np.asarray(counts, np.float64)
  domains, experts = counts.shape
  shares = counts.sum(axis=1) / max(counts.sum(), 1.0)
  spread = -sum(share * math.log(share) for share in shares if share > 0)
  return (domains - 1) * (experts - 1) / (2.0 * counts.sum() * spread) if spread else 0.0


def vocabulary_specialization(counts_VE: jax.Array) -> jax.Array:
  """Returns Spec(i, x) = N_xi / N_x of first choices, (V, E) float32 (arXiv 2409.02060 Eq. 8).

  Args:
    counts_VE: (V, E) counts of first choices, from `label_counts`. A token id that was never seen
      has a row of 0.
  """
  return ratio(counts_VE, jnp.sum(counts_VE, axis=1, keepdims=True))


@jax.jit
def mean_vocabulary_specialization(
  counts_VE: jax.Array, min_count: int = MIN_TOKEN_COUNT
) -> jax.Array:
  """Returns the mean over tokens of max_i Spec(i, x), a float32 scalar.

  Token ids seen fewer than `min_count` times are left out, and each id weighs as often as it was
  seen. At random: `expected_vocabulary_specialization`.
  """
  seen_V = jnp.sum(counts_VE, axis=1)
  kept_V = seen_V >= jnp.maximum(min_count, 1)
  largest_V = jnp.max(counts_VE, axis=1)
  return ratio(jnp.sum(jnp.where(kept_V, largest_V, 0)), jnp.sum(jnp.where(kept_V, seen_V, 0)))


@jax.jit
def olmoe_vocabulary_specialization(counts_VE: jax.Array) -> jax.Array:
  """Returns the mean over seen token ids of max_i Spec(i, x), as OLMoE publishes it.

  `scripts/run_moe_analysis.py` of allenai/OLMoE weighs every id alike, those seen once too, whose
  largest share is 1 whatever the router does. To compare with the paper's figures only.
  """
  largest_V = jnp.max(vocabulary_specialization(counts_VE), axis=1)
  return ratio(jnp.sum(largest_V), jnp.sum(jnp.sum(counts_VE, axis=1) > 0))


def expected_vocabulary_specialization(
  counts_VE: np.ndarray, min_count: int = MIN_TOKEN_COUNT
) -> float:
  """Returns `mean_vocabulary_specialization` of the same tokens routed uniformly at random.

  Above 1/E, since the largest of E sampled shares is: Monte Carlo for each N_x, standard error
  below 2 %. 0 where no token id was seen often enough.
  """
  counts_VE = np.asarray(counts_VE)
  experts = counts_VE.shape[1]
  times, ids = np.unique(counts_VE.sum(axis=1), return_counts=True)
  kept = times >= max(min_count, 1)
  tokens = (times * ids)[kept]
  if not tokens.size:
    return 0.0
  largest = [(max_violation_floor(int(n), experts) + 1.0) / experts for n in times[kept]]
  return float(np.dot(tokens, largest) / tokens.sum())
