"""All measures of a trace: at their floors for a random router, at their ends for extremes."""

import dataclasses

import numpy as np
import pytest

from moe_jax.analysis.routing_measures import (
  MEANINGS,
  Domains,
  coactivation_table,
  domain_shares,
  measure_changes,
  measure_routing,
)
from moe_jax.analysis.routing_trace import LayerTrace, RoutingTrace

B, L, E, V = 64, 128, 8, 50


def trace_of(experts: list[np.ndarray], step: int = 9, tokens: np.ndarray | None = None):
  """Returns the trace of a layer for each (B, L, K) of experts, with some padding."""
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, V, (B, L)).astype(np.int32) if tokens is None else tokens
  mask = np.ones((B, L), bool)
  mask[::7, -9:] = False
  layers = tuple(
    LayerTrace(
      ids.astype(np.int16),
      np.ones(ids.shape, np.float32),
      np.broadcast_to(mask[..., None], ids.shape),
      E,
    )
    for ids in experts
  )
  return RoutingTrace("run", step, tokens, mask, mask.astype(np.int32), layers)


def random_experts(top_k: int, seed: int) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return np.argsort(rng.random((B, L, E)), axis=-1)[..., :top_k]


DOMAINS = Domains(("a", "b", "c"), np.arange(B) % 3)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_router_that_ignores_its_input_is_at_the_floors(top_k):
  trace = trace_of([random_experts(top_k, seed) for seed in range(2)])
  found = measure_routing(trace, DOMAINS, V)
  tokens = trace.token_mask.sum()
  assert {m.name for m in found} <= set(MEANINGS)
  # Of biases the floor is the mean itself; of shares, where a binomial deviation is known, 5 of it.
  near = {
    "load_entropy": 2e-3,
    "max_violation": 0.06,
    "load_cv": 0.02,
    "starved_experts": 0.0,
    "max_coactivation": 0.04,
    "repetition_first": 5 * (E * tokens) ** -0.5,
    "repetition_any": 5 * 0.5 * tokens**-0.5,
    "repetition_lift": 5 * (E / tokens) ** 0.5,
    "domain_information": 3e-3,
    "domain_deviation": 0.02,
    "vocabulary_specialization": 0.01,
    "cross_layer_information": 3e-3,
    "path_diversity": 1e-3,
  }
  for measure in found:
    if measure.name in near:
      assert abs(measure.value - measure.floor) <= near[measure.name], measure
  assert ("max_coactivation" in {m.name for m in found}) == (top_k > 1)


def test_experts_of_domains_and_of_words_tell_all():
  by_domain = np.broadcast_to(DOMAINS.of_rows[:, None, None], (B, L, 1))
  tokens = np.random.default_rng(0).integers(0, E, (B, L)).astype(np.int32)
  trace = trace_of([by_domain, tokens[..., None]], tokens=tokens)
  found = {(m.name, m.layer): m.value for m in measure_routing(trace, DOMAINS, V)}
  assert found["domain_information", 0] == pytest.approx(1.0, abs=1e-6)
  assert found["domain_information", 1] < 0.01
  assert found["repetition_first", 0] == 1.0
  assert found["vocabulary_specialization", 1] == 1.0
  assert found["starved_experts", 0] == E - 3
  np.testing.assert_array_equal(domain_shares(trace, trace.layers[0], DOMAINS), np.eye(3, E))


def test_pairs_that_always_go_together_are_seen():
  first = random_experts(1, 0) // 2 * 2
  trace = trace_of([np.concatenate([first, first + 1], axis=-1)])
  expected = np.kron(np.eye(E // 2), [[0.0, 1.0], [1.0, 0.0]])
  np.testing.assert_allclose(coactivation_table(trace.layers[0]), expected, atol=1e-6)


def test_changes_are_measured_against_the_last_checkpoint():
  early, late = random_experts(2, 0), random_experts(2, 1)
  traces = [trace_of([ids], step) for step, ids in ((10, early), (20, late), (30, late))]
  found = {(m.name, m.step): (m.value, m.floor) for m in measure_changes(traces)}
  assert found["saturation", 30] == found["saturation", 20] == (1.0, 2 / E)
  value, floor = found["saturation", 10]
  assert value == pytest.approx(floor, abs=0.02)
  assert found["fluctuation", 30][0] == 0.0
  assert found["fluctuation", 20][0] == pytest.approx(1 - 1 / E, abs=0.02)
  assert measure_changes(traces[:1]) == []


def test_padding_counts_nowhere():
  trace = trace_of([random_experts(2, 0)])
  ids = trace.layers[0].expert.copy()
  ids[~trace.token_mask] = 0
  tokens = np.where(trace.token_mask, trace.tokens, 0)
  layer = dataclasses.replace(trace.layers[0], expert=ids)
  other = dataclasses.replace(trace, tokens=tokens, layers=(layer,))
  assert measure_routing(trace, DOMAINS, V) == measure_routing(other, DOMAINS, V)
