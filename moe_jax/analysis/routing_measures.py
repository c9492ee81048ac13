"""All measures of a recorded routing, each beside what a router that ignores its input would show.

The definitions are those of `moe_jax.analysis.router_metrics`; here they are taken together, of
`RoutingTrace`s without drops.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.router_metrics import (
  balance,
  coactivation,
  paths,
  repetition,
  specialization,
  stability,
)
from moe_jax.analysis.routing_trace import LayerTrace, RoutingTrace
from moe_jax.moe.metrics import max_violation_floor

# What each measure says, for people who read a table of them.
MEANINGS: Mapping[str, str] = {
  "load_entropy": "Entropy of the load over ln E; 1 is even.",
  "max_violation": "The fullest expert's load over the mean, minus 1 (arXiv 2408.15664).",
  "load_cv": "Standard deviation of the load over its mean (arXiv 1701.06538).",
  "starved_experts": "Experts with under a tenth of the mean load.",
  "router_confidence": "Mean of the largest probability; 1 is certain.",
  "max_coactivation": "Of one expert's tokens, most that share another one (arXiv 2409.02060).",
  "repetition_first": "Consecutive tokens with the same first choice (arXiv 2401.04088).",
  "repetition_lift": "That over what unequal load alone repeats; 1 is no memory.",
  "repetition_any": "Consecutive tokens that share any of their experts.",
  "domain_information": "How much of the domain the experts tell, 0 to 1.",
  "domain_deviation": "Mean of |share of a domain's tokens - K/E| (arXiv 2409.02060).",
  "vocabulary_specialization": "Mean share of a token's most frequent expert (arXiv 2409.02060).",
  "weight_similarity": "Mean cosine between the weights of two experts.",
  "cross_layer_information": "What the expert tells of the next layer's, nats.",
  "path_diversity": "Distinct paths through first choices, over tokens.",
  "path_entropy": "Entropy of these paths, nats.",
  "saturation": "Share of the last checkpoint's experts already chosen (arXiv 2409.02060).",
  "saturation_first": "The same of first choices alone.",
  "fluctuation": "First choices changed since the checkpoint before (arXiv 2204.08396).",
}


@dataclasses.dataclass(frozen=True)
class Measure:
  """One number.

  Attributes:
    name: a key of `MEANINGS`.
    layer: index among the MoE layers; None of all together.
    value: what was measured.
    floor: what a router that ignores its input would show of as many tokens; None if unknown.
    step: of the checkpoint, for what is measured between checkpoints; None of the one looked at.
  """

  name: str
  layer: int | None
  value: float
  floor: float | None
  step: int | None = None


@dataclasses.dataclass(frozen=True)
class Domains:
  """Where the rows of a trace come from.

  Attributes:
    names: of the texts.
    of_rows: (B,) index of each row's.
  """

  names: tuple[str, ...]
  of_rows: np.ndarray

  def of_tokens(self, shape: tuple[int, int]) -> jnp.ndarray:
    """Returns the index of each token's, (B, L)."""
    return jnp.broadcast_to(jnp.asarray(self.of_rows)[:, None], shape)


def measure_routing(trace: RoutingTrace, domains: Domains, vocab_size: int) -> list[Measure]:
  """Returns the measures of each layer, and of the layers together.

  Args:
    trace: dropless, of at least one real token.
    domains: of its rows; with one alone there are no measures of domains.
    vocab_size: V.
  """
  found = []
  for index, layer in enumerate(trace.layers):
    values = _of_layer(trace, layer, domains, vocab_size)
    found += [Measure(name, index, float(value), floor) for name, (value, floor) in values.items()]
  return found + _of_paths(trace)


def domain_shares(trace: RoutingTrace, layer: LayerTrace, domains: Domains) -> np.ndarray:
  """Returns (domains, E): the share of a domain's tokens that each expert is asked for."""
  counts, tokens = _domain_counts(trace, layer, domains)
  return np.asarray(specialization.domain_specialization(counts, tokens))


def coactivation_table(layer: LayerTrace) -> np.ndarray:
  """Returns (E, E): of the tokens of one expert, the share that ask for another one too."""
  counts = coactivation.coactivation_counts(
    jnp.asarray(layer.expert), layer.num_experts, jnp.asarray(layer.kept)
  )
  return np.asarray(coactivation.coactivation(counts))


def measure_changes(traces: Sequence[RoutingTrace]) -> list[Measure]:
  """Returns how routing moved over checkpoints, given the traces of the same tokens in order.

  Nothing of a single one.
  """
  found = []
  if len(traces) < 2:
    return found
  for index, last in enumerate(traces[-1].layers):
    experts, mask = last.num_experts, jnp.asarray(traces[-1].token_mask)
    layers = [jnp.asarray(trace.layers[index].expert) for trace in traces]
    top_k = layers[-1].shape[-1]
    for trace, expert in zip(traces, layers, strict=True):
      for name, k in (("saturation", top_k), ("saturation_first", 1)):
        value = stability.router_saturation(expert[..., :k], layers[-1][..., :k], mask)
        floor = stability.expected_saturation(experts, k)
        found.append(Measure(name, index, float(value), floor, trace.step))
    moved = stability.routing_fluctuation(jnp.stack([e[..., 0] for e in layers]), mask)
    floor = stability.expected_fluctuation(experts)
    for trace, value in zip(traces[1:], moved, strict=True):
      found.append(Measure("fluctuation", index, float(value), floor, trace.step))
  return found


def _of_layer(
  trace: RoutingTrace, layer: LayerTrace, domains: Domains, vocab_size: int
) -> dict[str, tuple[float, float | None]]:
  """Returns (value, floor) by name."""
  experts, top_k = layer.num_experts, layer.expert.shape[-1]
  expert, asked = jnp.asarray(layer.expert), jnp.asarray(layer.kept)
  counts = balance.expert_counts(expert, experts, asked)
  total = int(counts.sum())
  found = {
    "load_entropy": (balance.normalized_load_entropy(counts), 1.0),
    "max_violation": (balance.max_violation(counts), max_violation_floor(total, experts)),
    "load_cv": (
      balance.coefficient_of_variation(counts),
      balance.coefficient_of_variation_floor(total, experts),
    ),
    "starved_experts": (balance.dead_experts(counts, tau=0.1), 0.0),
  }
  if top_k > 1:
    expected = coactivation.expected_coactivation(experts, top_k)
    found["max_coactivation"] = (coactivation_table(layer).max(), expected)
  found |= _repetition(trace, layer)
  if len(domains.names) > 1:
    by_domain, tokens = _domain_counts(trace, layer, domains)
    shares = specialization.domain_specialization(by_domain, tokens)
    bias = specialization.expected_domain_information(np.asarray(by_domain))
    found["domain_information"] = (specialization.domain_information(by_domain), bias)
    found["domain_deviation"] = (specialization.specialization_deviation(shares, top_k), 0.0)
  words = specialization.label_counts(
    expert[..., :1], jnp.asarray(trace.tokens), experts, vocab_size, asked[..., :1]
  )
  found["vocabulary_specialization"] = (
    specialization.mean_vocabulary_specialization(words),
    specialization.expected_vocabulary_specialization(np.asarray(words)),
  )
  return found


def _repetition(trace: RoutingTrace, layer: LayerTrace) -> dict[str, tuple[float, float]]:
  experts, top_k = layer.num_experts, layer.expert.shape[-1]
  # A token that asked nobody repeats nobody.
  real, segments = (
    jnp.asarray(trace.token_mask & layer.kept[..., 0]),
    jnp.asarray(trace.segment_ids),
  )

  def repeats(k):
    pairs = repetition.repetition_counts(jnp.asarray(layer.expert[..., :k]), real, segments)
    return repetition.repetition(*pairs), repetition.expected_repetition(experts, k)

  found = {"repetition_first": repeats(1)}
  if top_k > 1:
    found["repetition_any"] = repeats(top_k)
  first = balance.expert_counts(
    jnp.asarray(layer.expert[..., :1]), experts, jnp.asarray(layer.kept[..., :1])
  )
  by_load = repetition.load_repetition(first)
  lift = repetition.repetition_lift(found["repetition_first"][0], by_load)
  return found | {"repetition_lift": (lift, 1.0)}


def _domain_counts(trace, layer, domains: Domains) -> tuple[jnp.ndarray, jnp.ndarray]:
  labels, number = domains.of_tokens(trace.tokens.shape), len(domains.names)
  expert, asked = jnp.asarray(layer.expert), jnp.asarray(layer.kept)
  counts = specialization.label_counts(expert, labels, layer.num_experts, number, asked)
  mask = jnp.asarray(trace.token_mask)
  return counts, specialization.label_tokens(labels, number, mask)


def _of_paths(trace: RoutingTrace) -> list[Measure]:
  """Returns the measures across layers; none of a single one."""
  if len(trace.layers) < 2:
    return []
  first = np.stack([layer.expert[..., 0] for layer in trace.layers])
  routed = trace.token_mask & np.all([layer.kept[..., 0] for layer in trace.layers], axis=0)
  experts, tokens = trace.layers[0].num_experts, int(routed.sum())
  counts = paths.path_counts(first, routed)
  expected = paths.expected_path_diversity(tokens, experts, len(trace.layers))
  transitions = paths.transition_counts(jnp.asarray(first), experts, jnp.asarray(routed))
  bias = paths.expected_cross_layer_information(tokens, experts)
  related = paths.cross_layer_information(transitions)
  return [
    Measure("path_diversity", None, paths.path_diversity(counts), expected),
    Measure("path_entropy", None, paths.path_entropy(counts), None),
    *(
      Measure("cross_layer_information", index, float(value), bias)
      for index, value in enumerate(related)
    ),
  ]
