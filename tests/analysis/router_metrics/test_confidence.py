"""Metrics of probabilities and logits."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from analysis.router_metrics.drawn import E, K, draw_probabilities, draw_routing
from oracles import router_metrics

from moe_jax.analysis.router_metrics import confidence

UNIFORM = jnp.full((5, E), 1 / E)
# Every token certain, each expert once: as sure and as balanced as can be.
CERTAIN = jnp.eye(E)


@pytest.mark.parametrize(
  ("metric", "uniform", "certain"),
  [
    (confidence.router_confidence, 1 / E, 1.0),
    (lambda probs: confidence.top_k_mass(probs, K), K / E, 1.0),
    (confidence.top_margin, 0.0, 1.0),
    (confidence.token_entropy, math.log(E), 0.0),
    (confidence.expert_entropy, math.log(E), math.log(E)),
    (confidence.routing_information, 0.0, math.log(E)),
    (confidence.normalized_routing_information, 0.0, 1.0),
  ],
)
def test_extremes(metric, uniform, certain):
  np.testing.assert_allclose(metric(UNIFORM), uniform, atol=1e-6)
  np.testing.assert_allclose(metric(CERTAIN), certain, atol=1e-6)


def test_real_tokens_equal_loops_and_padding_reaches_nothing():
  logits, probs = draw_probabilities()
  mask = draw_routing()[2]
  rows = [row.astype(np.float64) for row in probs[mask]]
  ranked = [sorted(row, reverse=True) for row in rows]
  spoilt = np.where(mask[..., None], probs, np.nan)

  def expect(metric, value):
    # Sums of a few dozen float32 numbers.
    np.testing.assert_allclose(metric(spoilt, token_mask=mask), value, rtol=1e-5)

  expect(confidence.router_confidence, np.mean([r[0] for r in ranked]))
  expect(confidence.top_margin, np.mean([r[0] - r[1] for r in ranked]))
  local = np.mean([router_metrics.entropy(row) for row in rows])
  overall = router_metrics.entropy(np.sum(rows, axis=0))
  expect(confidence.token_entropy, local)
  expect(confidence.expert_entropy, overall)
  expect(confidence.routing_information, overall - local)
  mass = confidence.top_k_mass(spoilt, K, mask)
  np.testing.assert_allclose(mass, np.mean([sum(r[:K]) for r in ranked]), rtol=1e-5)


def test_logit_health():
  logits = draw_probabilities()[0]
  mask = draw_routing()[2]
  spoilt = np.where(mask[..., None], logits, np.inf)
  real = logits[mask].astype(np.float64)
  np.testing.assert_allclose(confidence.max_abs_logit(spoilt, mask), np.abs(real).max())
  squared = np.mean([math.log(sum(math.exp(z) for z in row)) ** 2 for row in real])
  np.testing.assert_allclose(confidence.mean_squared_logsumexp(spoilt, mask), squared, rtol=1e-5)
  zeros = jnp.zeros((3, E))
  np.testing.assert_allclose(confidence.mean_squared_logsumexp(zeros), math.log(E) ** 2, rtol=1e-6)


def test_small_information_is_not_lost_to_rounding():
  shift = 1e-3 * np.where(np.arange(E) % 2, 1.0, -1.0)
  probs = np.stack([(1 + shift) / E, (1 - shift) / E])
  # KL of p(1 + s) from p is about the mean of s^2 / 2.
  np.testing.assert_allclose(confidence.routing_information(probs), 0.5e-6, rtol=0.3)


def test_no_token_and_a_single_expert():
  nothing = jnp.zeros(5, bool)
  assert confidence.router_confidence(UNIFORM, nothing) == 0.0
  assert confidence.max_abs_logit(UNIFORM, nothing) == 0.0
  alone = jnp.ones((4, 1))
  assert confidence.top_margin(alone) == 1.0
  assert confidence.normalized_routing_information(alone) == 0.0


def test_scores_become_probabilities():
  scores = jnp.array([[0.2, 0.6], [0.0, 0.0]])
  np.testing.assert_allclose(confidence.as_probabilities(scores), [[0.25, 0.75], [0, 0]])
