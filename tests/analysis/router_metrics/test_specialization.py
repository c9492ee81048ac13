"""Domain and vocabulary specialisation."""

import math

import numpy as np
import pytest
from analysis.router_metrics.drawn import B, E, K, L, draw_routing
from oracles import router_metrics

from moe_jax.analysis.router_metrics import specialization as sp
from moe_jax.errors import UserError

DOMAINS = 3


def draw_labels(num_labels, seed=5):
  return np.random.default_rng(seed).integers(0, num_labels, (B, L)).astype(np.int32)


def test_table_and_divergence_equal_loops():
  expert, asked, _ = draw_routing()
  domain = draw_labels(DOMAINS)
  counts = np.asarray(sp.label_counts(expert, domain, E, DOMAINS, asked))
  labelled = [
    (int(domain[i]), [int(e) for e, a in zip(expert[i], asked[i], strict=True) if a])
    for i in np.ndindex(B, L)
  ]
  expected = router_metrics.label_table(labelled, DOMAINS, E)
  np.testing.assert_array_equal(counts, expected)

  divergence = np.asarray(sp.domain_divergence(counts))
  loops = [[router_metrics.jensen_shannon(p, q) for q in expected] for p in expected]
  # Divergences cancel from entropies of order 1 in the loops, in float32 not at all.
  np.testing.assert_allclose(divergence, loops, rtol=1e-5, atol=1e-7)
  spread = router_metrics.entropy([sum(row) for row in expected])
  information = router_metrics.mutual_information(expected) / spread
  np.testing.assert_allclose(sp.domain_information(counts), information, rtol=1e-5)


def test_specialization_rows_sum_to_the_choices():
  expert, _, mask = draw_routing()
  domain = draw_labels(DOMAINS)
  counts = sp.label_counts(expert, domain, E, DOMAINS, np.repeat(mask[..., None], K, axis=-1))
  table = sp.domain_specialization(counts, sp.label_tokens(domain, DOMAINS, mask))
  np.testing.assert_allclose(table.sum(axis=1), K, rtol=1e-6)


def test_extremes_of_domain_metrics():
  own_expert = 10 * np.eye(DOMAINS, dtype=np.int32)
  np.testing.assert_allclose(sp.domain_information(own_expert), 1.0, rtol=1e-6)
  apart = np.asarray(sp.domain_divergence(own_expert))
  np.testing.assert_allclose(apart, math.log(2) * (1 - np.eye(DOMAINS)), rtol=1e-6, atol=1e-7)
  same = np.ones((DOMAINS, E), np.int32)
  np.testing.assert_allclose(sp.domain_information(same), 0.0, atol=1e-6)
  specialization = sp.domain_specialization(same, np.full(DOMAINS, E))
  np.testing.assert_allclose(sp.specialization_deviation(specialization, 1), 0.0, atol=1e-7)
  np.testing.assert_allclose(sp.specialization_deviation(np.eye(2), 1), 0.5)


def test_unrelated_domains_show_the_information_of_the_baseline():
  rng = np.random.default_rng(0)
  found, expected = [], []
  for _ in range(20):
    counts = rng.multinomial(400, np.full(DOMAINS * E, 1 / (DOMAINS * E))).reshape(DOMAINS, E)
    found.append(float(sp.domain_information(counts)))
    expected.append(sp.expected_domain_information(counts))
  # 2 N I is about chi-square with 14 degrees: 38 % each, 8.5 % of the mean of 20.
  np.testing.assert_allclose(np.mean(found), np.mean(expected), rtol=0.25)


def test_vocabulary_specialization_equals_loops():
  rng = np.random.default_rng(3)
  ids, first = rng.integers(0, 6, 70) ** 2 % 11, rng.integers(0, E, 70)
  counts = np.asarray(sp.label_counts(first[:, None], ids, E, 11))
  labelled = list(zip(ids.tolist(), first.tolist(), strict=True))
  weighted, by_type = router_metrics.vocabulary_specialization(labelled, min_count=12)
  np.testing.assert_allclose(sp.mean_vocabulary_specialization(counts, 12), weighted, rtol=1e-6)
  np.testing.assert_allclose(sp.olmoe_vocabulary_specialization(counts), by_type, rtol=1e-6)


def test_rare_tokens_count_in_the_published_form_alone():
  # One id seen 20 times, evenly; two ids seen once: the largest share of those is 1 by necessity.
  counts = np.array([[10, 10], [1, 0], [0, 1], [0, 0]])
  np.testing.assert_allclose(sp.mean_vocabulary_specialization(counts), 0.5)
  np.testing.assert_allclose(sp.olmoe_vocabulary_specialization(counts), 2.5 / 3, rtol=1e-6)
  table = sp.vocabulary_specialization(counts)
  np.testing.assert_allclose(table, [[0.5, 0.5], [1, 0], [0, 1], [0, 0]])
  assert sp.mean_vocabulary_specialization(counts[1:]) == 0.0
  assert sp.expected_vocabulary_specialization(counts[1:]) == 0.0


def test_random_routing_shows_the_vocabulary_baseline_above_one_over_E():
  rng = np.random.default_rng(0)
  counts = np.stack([rng.multinomial(n, np.full(E, 1 / E)) for n in [12, 12, 40] * 200])
  expected = sp.expected_vocabulary_specialization(counts)
  assert expected > 1.5 / E
  # Monte Carlo below 2 % on one side, 600 sampled ids on the other.
  np.testing.assert_allclose(sp.mean_vocabulary_specialization(counts), expected, rtol=0.05)


def test_labels_that_do_not_fit_are_refused():
  with pytest.raises(UserError, match="label has shape"):
    sp.label_counts(np.zeros((2, 1), int), np.zeros(3, int), E, DOMAINS)
  with pytest.raises(UserError, match="label holds 3"):
    sp.label_counts(np.zeros((1, 1), int), np.array([3]), E, DOMAINS)
