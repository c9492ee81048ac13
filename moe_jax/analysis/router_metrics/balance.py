"""How evenly the experts are loaded: functions of counts, over their last axis E.

Counts are of assignments asked for, before any drop, c_e; f_e = c_e / sum c sums to 1. A leading
axis of layers stays: `summarize_layers` gives the mean and the maximum over it. Ratios come last:
add the counts of microbatches and devices, then call these. Without any load the fractions and
their spread are 0, as if nothing were wrong; `dead_experts` is E.
"""

import math

import jax
import jax.numpy as jnp

from moe_jax.analysis.router_metrics.arrays import count_ids, full_mask, ratio, refuse_out_of_range
from moe_jax.analysis.router_metrics.information import distribution, entropy
from moe_jax.errors import UserError


def expert_counts(expert: jax.Array, num_experts: int, asked: jax.Array | None = None) -> jax.Array:
  """Counts the assignments that ask for each expert: (E,) int32.

  Args:
    expert: (..., K) expert ids; with `[..., :1]` the first choices alone.
    num_experts: E.
    asked: (..., K) bool, False for padding and choices that were not made.

  Raises:
    UserError: a mask that does not fit, or an id out of range outside a compiled function.
  """
  return count_ids(expert, num_experts, full_mask(asked, expert.shape, "asked"), "expert")


def load_fractions(counts_E: jax.Array) -> jax.Array:
  """Returns f = c / sum c, (..., E). Uniform: 1/E."""
  return distribution(counts_E)


def load_entropy(counts_E: jax.Array) -> jax.Array:
  """Returns H = -sum f ln f in nats, (...). Uniform: ln E. One expert alone: 0."""
  return entropy(counts_E)


def normalized_load_entropy(counts_E: jax.Array) -> jax.Array:
  """Returns H / ln E, (...). Uniform: 1; a single expert is always balanced: 1."""
  if counts_E.shape[-1] == 1:
    return jnp.ones(counts_E.shape[:-1], jnp.float32)
  return load_entropy(counts_E) / math.log(counts_E.shape[-1])


def effective_experts(counts_E: jax.Array) -> jax.Array:
  """Returns exp(H), the number of equally loaded experts of the same entropy, (...). Uniform: E."""
  return jnp.exp(load_entropy(counts_E))


@jax.jit
def squared_coefficient_of_variation(values_E: jax.Array) -> jax.Array:
  """Returns CV^2 = Var(v) / mean(v)^2, (...), with the population variance.

  Shazeer et al. (arXiv 1701.06538 Eq. 7) use it of loads and of importances. The sample variance
  of some libraries gives E / (E - 1) times as much. Uniform: 0. One-hot: E - 1. Of N assignments
  that fall at random: `expected_squared_cv`.
  """
  values_E = jnp.asarray(values_E, jnp.float32)
  mean = jnp.mean(values_E, axis=-1)
  return ratio(jnp.var(values_E, axis=-1), jnp.square(mean))


@jax.jit
def coefficient_of_variation(values_E: jax.Array) -> jax.Array:
  """Returns CV = std(v) / mean(v), (...), with the population deviation; see its square.

  Uniform: 0. One-hot: sqrt(E - 1). At random: about `coefficient_of_variation_floor`.
  """
  return jnp.sqrt(squared_coefficient_of_variation(values_E))


def expected_squared_cv(num_assignments: int, num_experts: int) -> float:
  """Returns E[CV^2] = (E - 1) / N of N uniformly random assignments, exactly."""
  return (num_experts - 1) / num_assignments


def coefficient_of_variation_floor(num_assignments: int, num_experts: int) -> float:
  """Returns sqrt((E - 1) / N), the root mean square CV of N uniformly random assignments.

  What even a perfect router shows: 0.058 for 2,048 assignments to 8 experts.
  """
  return math.sqrt(expected_squared_cv(num_assignments, num_experts))


def importance(
  expert: jax.Array, weights: jax.Array, num_experts: int, asked: jax.Array | None = None
) -> jax.Array:
  """Sums the gates of each expert, Imp_e = sum_t g_te: (E,) float32.

  The gate is taken after the top-k and before any drop (arXiv 1701.06538 Eq. 6); its CV is the
  importance loss. An expert can have balanced load and unbalanced importance.

  Args:
    expert: (..., K) expert ids.
    weights: (..., K) gates g of those experts, not yet zeroed by drops.
    num_experts: E.
    asked: (..., K) bool.

  Raises:
    UserError: a mask or weights that do not fit, or an id out of range outside a compiled function.
  """
  if weights.shape != expert.shape:
    raise UserError(f"weights have shape {weights.shape}; expected that of expert, {expert.shape}")
  asked = full_mask(asked, expert.shape, "asked")
  refuse_out_of_range(expert, num_experts, asked, "expert")
  # `num_experts` is dropped by the scatter; a negative id would count from the end.
  index = jnp.where(asked & (expert >= 0), expert, num_experts)
  gates = jnp.where(asked, weights, 0.0).astype(jnp.float32)
  return jnp.zeros(num_experts, jnp.float32).at[index].add(gates, mode="drop")


@jax.jit
def max_violation(counts_E: jax.Array) -> jax.Array:
  """Returns MaxVio = (max c - mean c) / mean c, (...) (arXiv 2408.15664 Eq. 4).

  Of the counts of one training step this is the paper's MaxVio_batch, of the counts of a whole
  validation set its MaxVio_global. Uniform: 0. One-hot: E - 1. At random:
  `moe_jax.moe.metrics.max_violation_floor`. Differences of the largest and smallest load, or
  max |f - 1/E|, go by the same name elsewhere and are other quantities.
  """
  counts_E = jnp.asarray(counts_E, jnp.float32)
  mean = jnp.mean(counts_E, axis=-1)
  return ratio(jnp.max(counts_E, axis=-1) - mean, mean)


def max_over_mean_load(counts_E: jax.Array) -> jax.Array:
  """Returns max c / mean c = MaxVio + 1, (...) (arXiv 1701.06538 Table 6).

  Also the slots, over what balance needs, that a capacity without drops must have. Of
  `communication.device_counts` it is the straggler factor: how much longer the fullest device
  works.
  """
  return max_violation(counts_E) + 1.0


def dead_experts(counts_E: jax.Array, tau: float = 0.0) -> jax.Array:
  """Counts the experts with c_e = 0 or c_e < tau * mean c: (...) int32.

  No standard names tau or the window: give both with the figure, tau = 0 and 0.1, over 100 steps
  or more, or a whole validation set. A small window has dead experts by chance.

  Raises:
    UserError: a negative tau.
  """
  if tau < 0:
    raise UserError(f"tau = {tau} is refused: it must be 0 or greater, for example 0.1")
  counts_E = jnp.asarray(counts_E, jnp.float32)
  starved = counts_E < tau * jnp.mean(counts_E, axis=-1, keepdims=True)
  return jnp.sum((counts_E == 0) | starved, axis=-1, dtype=jnp.int32)


def permanently_dead_experts(counts_by_step_E: jax.Array, last_fraction: float = 0.2) -> jax.Array:
  """Counts the experts that nobody asked for in the last part of training: int32.

  Args:
    counts_by_step_E: (steps, E) counts, one row a step, equally spaced.
    last_fraction: the part of the steps that is looked at, rounded up to a whole step.

  Raises:
    UserError: `last_fraction` is not in (0, 1].
  """
  if not 0 < last_fraction <= 1:
    raise UserError(f"last_fraction = {last_fraction} is refused: it must be in (0, 1]")
  steps = math.ceil(last_fraction * counts_by_step_E.shape[0])
  return dead_experts(jnp.sum(counts_by_step_E[-steps:], axis=0))


@jax.jit
def normalized_balance_loss(counts_E: jax.Array, probability_E: jax.Array) -> jax.Array:
  """Returns E * sum_e f_e P_e with f and P scaled to sum to 1, (...). Uniform: 1.

  With the counts of first choices this is Switch's loss (arXiv 2101.03961 Eq. 4) and E^2 times
  GShard's (arXiv 2006.16668 Algorithm 1); with those of all choices the loss of OLMoE and of
  Hugging Face divided by K. So normalised, values of different papers compare. It is no measure of
  balance: f = (0.6, 0.4) with P = (0.31, 0.69) gives 0.92.

  Args:
    counts_E: (..., E) counts before any drop.
    probability_E: (..., E) sums or means over tokens of the router's probabilities.
  """
  products = distribution(counts_E) * distribution(probability_E)
  return counts_E.shape[-1] * jnp.sum(products, axis=-1)


def summarize_layers(values: jax.Array) -> dict[str, jax.Array]:
  """Returns the `mean` (arXiv 2408.15664's convention) and `max` over the first axis, layers."""
  return {"mean": jnp.mean(values, axis=0), "max": jnp.max(values, axis=0)}
