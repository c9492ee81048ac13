"""Score stage: router logits -> scores in float32."""

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import GroupScore, Noise, Score
from moe_jax.moe.weights import normalize
from moe_jax.sharding.local import row_top_k


def softmax_scores(logits: jax.Array) -> jax.Array:
  """Returns softmax over experts, float32.

  Float32 whatever the activations are: bfloat16 scores change the selected experts of about 2 % of
  tokens (the selective precision of Switch, arXiv 2101.03961 section 2.4).
  """
  return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def sqrt_softplus(logits: jax.Array) -> jax.Array:
  """Returns sqrt(log(1 + exp(z))), float32, with a finite gradient for very negative logits."""
  softplus = jax.nn.softplus(logits.astype(jnp.float32))
  # The derivative of sqrt at 0 is infinite, and softplus underflows to 0 below about -104.
  return jnp.sqrt(jnp.maximum(softplus, jnp.finfo(jnp.float32).tiny))


_SCORES = {
  Score.SOFTMAX: softmax_scores,
  Score.SIGMOID: jax.nn.sigmoid,
  Score.SQRT_SOFTPLUS: sqrt_softplus,
  Score.RELU: jax.nn.relu,
}


def score_logits(logits: jax.Array, config: RoutingConfig) -> jax.Array:
  """Returns the scores (G, S, E or more) float32 of logits (G, S, E') float32, see `Score`."""
  if config.selection == "hierarchical":
    return hierarchical_scores(logits, config)
  return _SCORES[config.score](logits)


def probabilities(scores_GSE: jax.Array, config: RoutingConfig) -> jax.Array:
  """Returns what the balance loss averages as P, (G, S, E') float32.

  Softmax scores sum to 1 already. Sigmoid-like scores are divided by their sum (DeepSeek-V3,
  arXiv 2412.19437 Eq. 19). ReLU scores stay as they are: their size is what the loss of ReMoE
  shrinks (arXiv 2412.14711 Eq. 10).
  """
  if config.score in (Score.SIGMOID, Score.SQRT_SOFTPLUS):
    return normalize(scores_GSE, 1.0)
  return scores_GSE


def draw_noise(
  shape: tuple[int, ...], config: RoutingConfig, key: jax.Array, std: jax.Array | None
) -> jax.Array:
  """Draws the noise (G, S, E') float32 that training adds to the logits.

  Args:
    shape: of the logits.
    config: `noise` and `noise_std` are read.
    key: a key of its own.
    std: `noise_std(...)` for normal noise.
  """
  if config.noise == Noise.GUMBEL:
    return config.noise_std * jax.random.gumbel(key, shape)
  return jax.random.normal(key, shape) * std


def noise_std(
  shape: tuple[int, ...], config: RoutingConfig, noise_scale: jax.Array | None
) -> jax.Array:
  """Returns the standard deviation (G, S, E') of gaussian or learned noise, float32."""
  if config.noise == Noise.GAUSSIAN:
    return jnp.full(shape, config.noise_std, jnp.float32)
  if noise_scale is None or noise_scale.shape != shape:
    got = None if noise_scale is None else noise_scale.shape
    raise UserError(
      f"noise_scale has shape {got}; noise = learned needs the standard deviation of every logit,"
      f" {shape}"
    )
  return noise_scale.astype(jnp.float32)


def hierarchical_scores(logits: jax.Array, config: RoutingConfig) -> jax.Array:
  """Returns P(expert) = P(gate) P(expert | gate), (G, S, E) float32 (arXiv 1701.06538 App. B).

  Args:
    logits: (G, S, E + gates): E second-level logits, then one a first-level gate. Experts of a
      gate have consecutive ids.
    config: `num_expert_groups` is the number of gates.
  """
  gates, E = config.num_expert_groups, config.num_experts
  first = softmax_scores(logits[..., E:])
  second = softmax_scores(by_expert_group(logits[..., :E], gates))
  return (first[..., None] * second).reshape(*logits.shape[:-1], E)


def by_expert_group(values_GSE: jax.Array, num_expert_groups: int) -> jax.Array:
  """Returns (G, S, groups, E / groups) of (G, S, E)."""
  return values_GSE.reshape(*values_GSE.shape[:-1], num_expert_groups, -1)


def limit_to_groups(ranking_GSE: jax.Array, config: RoutingConfig) -> jax.Array:
  """Sets every expert outside the token's best expert groups to -inf.

  Minus infinity, not 0: with a selection bias scores can be negative, and a 0 would win.
  """
  groups = config.num_expert_groups
  grouped = by_expert_group(ranking_GSE, groups)
  if config.group_score == GroupScore.MAX:
    group_score = jnp.max(grouped, axis=-1)
  else:
    group_score = jnp.sum(row_top_k(grouped, 2)[0], axis=-1)
  _, best = row_top_k(group_score, config.top_expert_groups)
  allowed = jnp.any(jax.nn.one_hot(best, groups, dtype=bool), axis=-2)
  return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(ranking_GSE.shape)
