"""What holds for every metric: names of experts do not matter, and masks hide what they mask."""

import jax
import numpy as np
import pytest
from analysis.router_metrics.drawn import E, K, draw_probabilities, draw_routing

from moe_jax.analysis.router_metrics import (
  balance,
  coactivation,
  confidence,
  paths,
  repetition,
  similarity,
  specialization,
  stability,
)

EXPERT, ASKED, MASK = draw_routing(7)
OTHER = draw_routing(8)[0]
DOMAIN = np.random.default_rng(0).integers(0, 3, MASK.shape)
PROBS = draw_probabilities(7)[1]
ORDER = np.random.default_rng(1).permutation(E)  # expert e is renamed ORDER[e]


def counts_of(expert):
  return balance.expert_counts(expert, E, ASKED)


def labels_of(expert):
  return specialization.label_counts(expert, DOMAIN, E, 3, ASKED)


OF_IDS = {
  "load_entropy": lambda a, b: balance.load_entropy(counts_of(a)),
  "cv": lambda a, b: balance.coefficient_of_variation(counts_of(a)),
  "max_violation": lambda a, b: balance.max_violation(counts_of(a)),
  "dead_experts": lambda a, b: balance.dead_experts(counts_of(a), 0.5),
  "load_repetition": lambda a, b: repetition.load_repetition(counts_of(a)),
  "saturation": lambda a, b: stability.router_saturation(a, b, MASK),
  "domain_information": lambda a, b: specialization.domain_information(labels_of(a)),
  "domain_divergence": lambda a, b: specialization.domain_divergence(labels_of(a)),
  "vocabulary": lambda a, b: specialization.olmoe_vocabulary_specialization(labels_of(a)),
  "repetition": lambda a, b: repetition.repetition(*repetition.repetition_counts(a, MASK)),
  "cross_layer": lambda a, b: paths.cross_layer_information(
    paths.transition_counts(np.stack([a[..., 0], b[..., 0]]), E, MASK & np.all(b >= 0, axis=-1))
  ),
}
OF_PROBABILITIES = [
  confidence.router_confidence,
  confidence.top_margin,
  confidence.token_entropy,
  confidence.routing_information,
]


def renamed(expert):
  return np.where(expert < 0, expert, ORDER[expert])


@pytest.mark.parametrize("name", OF_IDS)
def test_renaming_the_experts_changes_nothing(name):
  before, after = OF_IDS[name](EXPERT, OTHER), OF_IDS[name](renamed(EXPERT), renamed(OTHER))
  # Sums of the same float32 numbers in another order.
  np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-7)
  assert np.any(np.asarray(before) != 0)


def test_renaming_the_experts_permutes_tables():
  def tables(expert):
    table = coactivation.coactivation(coactivation.coactivation_counts(expert, E, ASKED))
    return np.asarray(counts_of(expert)), np.asarray(table)

  (counts, table), (new_counts, new_table) = tables(EXPERT), tables(renamed(EXPERT))
  np.testing.assert_array_equal(new_counts[ORDER], counts)
  np.testing.assert_array_equal(new_table[np.ix_(ORDER, ORDER)], table)


@pytest.mark.parametrize("metric", OF_PROBABILITIES)
def test_renaming_the_probabilities_changes_nothing(metric):
  before, after = metric(PROBS, MASK), metric(PROBS[..., ORDER], MASK)
  np.testing.assert_allclose(after, before, rtol=1e-5)


def test_reordering_experts_keeps_their_similarity():
  outputs = np.random.default_rng(0).normal(size=(4, 12, 3)).astype(np.float32)
  before = similarity.output_similarity(outputs)
  np.testing.assert_allclose(similarity.output_similarity(outputs[::-1]), before, rtol=1e-5)


def test_metrics_compile():
  @jax.jit
  def everything(expert, asked, mask, probs):
    counts = balance.expert_counts(expert, E, asked)
    pairs = coactivation.coactivation_counts(expert, E, asked)
    return (
      balance.max_violation(counts),
      coactivation.coactivation(pairs),
      confidence.routing_information(probs, mask),
      confidence.top_k_mass(probs, K, mask),
      stability.router_saturation(expert, expert, mask),
      specialization.domain_information(specialization.label_counts(expert, DOMAIN, E, 3, asked)),
      repetition.repetition(*repetition.repetition_counts(expert, mask)),
    )

  results = everything(EXPERT, ASKED, MASK, PROBS)
  np.testing.assert_allclose(results[0], balance.max_violation(counts_of(EXPERT)), rtol=1e-6)
  assert all(np.all(np.isfinite(result)) for result in results)
