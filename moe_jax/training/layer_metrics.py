"""A layer's router metrics over a step: what is summed over microbatches, and the ratios of sums.

A mean of ratios is not the ratio of the whole where microbatches hold different numbers of real
tokens, so every metric is multiplied by its own denominator before it is summed. The one exception:
`slots_per_assignment` leaves out the slots of a microbatch without a real token, which help nobody.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.metrics import load_statistics
from moe_jax.training.microbatches import Share

LayerMetrics = dict[str, jax.Array]

_PER_ASSIGNMENT = frozenset({"load", "dropped_fraction"})
# The number of slots does not depend on the microbatch.
_PER_SLOT = frozenset({"capacity_utilization", "effective_capacity_factor", "max_violation_floor"})
# The fraction in a loss has the loss's denominator.
_PER_LOSS_TOKEN = frozenset({"balance_load"})


def summands(metrics: LayerMetrics, share: Share) -> LayerMetrics:
  """Returns what to sum over microbatches, from a plan's metrics."""
  assignments = metrics["assignments"]

  def weigh(name, value):
    if name == "assignments":
      return value
    if name in _PER_ASSIGNMENT:
      return value * assignments
    if name in _PER_SLOT:
      return value * share.count
    return value * (share.losses if name in _PER_LOSS_TOKEN else share.tokens)

  return {name: weigh(name, value) for name, value in metrics.items()}


def ratios(summed: LayerMetrics) -> LayerMetrics:
  """Returns the metrics of the whole step, from sums over its microbatches."""
  denominator = jnp.maximum(summed["assignments"], 1.0)
  metrics = {
    name: value / denominator if name in _PER_ASSIGNMENT else value
    for name, value in summed.items()
  }
  return metrics | load_statistics(metrics["load"])


def load_counts(metrics: LayerMetrics) -> jax.Array:
  """Returns (E,) float32, how many assignments asked for each expert."""
  # A fraction times its denominator may miss the whole number by a rounding, and the sign rule
  # tells a balanced expert from one that is off by anything.
  return jnp.round(metrics["load"] * metrics["assignments"])
