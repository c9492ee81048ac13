"""Router losses over real tokens, in float32: load balance, importance, load and router z-loss.

| name | weight | formula | uniform routing |
|---|---|---|---|
| `load_balance` | `balance_loss_weight` | E sum_e f_e P_e | 1, or K |
| `router_z` | `z_loss_weight` | mean over tokens of logsumexp(logits)^2 | |
| `importance` | `importance_loss_weight` | CV^2 of the weights' (or scores') sum per expert | 0 |
| `load` | `load_loss_weight` | CV^2 of the probability mass of being selected, with noise | 0 |

Those over devices stand in `device_losses.py`.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import (
  BalanceFraction,
  BalanceScope,
  LoadThreshold,
  LossPadding,
)
from moe_jax.moe.segments import segment_runs, sum_by_run
from moe_jax.sharding.local import row_top_k


def loss_weights(config: RoutingConfig) -> dict[str, float]:
  """Returns the coefficient of each loss by name."""
  return {
    "load_balance": config.balance_loss_weight,
    "router_z": config.z_loss_weight,
    "importance": config.importance_loss_weight,
    "load": config.load_loss_weight,
    "device_balance": config.device_loss_weight,
    "communication": config.communication_loss_weight,
  }


def load_balance_loss(
  probs_GSE: jax.Array,
  counted_GSE: jax.Array,
  mask_GS: jax.Array,
  config: RoutingConfig,
  *,
  segment_ids: jax.Array | None = None,
  global_load: jax.Array | None = None,
) -> jax.Array:
  """Returns E * sum_e f_e P_e, a float32 scalar.

  f_e is the mean over tokens of what asked for expert e, P_e the mean probability of e; only P
  carries a gradient (Switch, arXiv 2101.03961 Eq. 4-6). GShard's auxiliary loss (arXiv 2006.16668
  Algorithm 1, `l_aux`) is this one with f from first choices, per group, divided by E^2; that of
  DeepSeek-V3 (arXiv 2412.19437 Eq. 17-20) has `all_choices_mean` per sequence. Uniform routing
  gives 1, or K with `all_choices`.

  Args:
    probs_GSE: (G, S, E) float32; see `moe_jax.moe.scores.probabilities`.
    counted_GSE: (G, S, E) float32, 1 where a token's assignment counts in f (0 for padding).
    mask_GS: (G, S) bool, True = real token.
    config: the `balance_*` fields and `loss_padding` are read.
    segment_ids: (G, S), needed by the scope `sequence`.
    global_load: (E,) f of the whole optimiser step, for the scope `global_batch`; None takes the
      f of this call, which is the same where one call is the whole step.
  """
  asked_GSE = counted_GSE
  if config.balance_fraction == BalanceFraction.ALL_CHOICES_MEAN:
    asked_GSE = asked_GSE / config.top_k
  ids, load = segment_ids, global_load
  return sum_of_products(probs_GSE, asked_GSE, mask_GS, config, segment_ids=ids, global_load=load)


def sum_of_products(
  probs_GSX: jax.Array,
  counted_GSX: jax.Array,
  mask_GS: jax.Array,
  config: RoutingConfig,
  *,
  segment_ids: jax.Array | None,
  global_load: jax.Array | None,
) -> jax.Array:
  """Returns X * sum_x f_x P_x over whatever X is balanced, f and P means over `balance_scope`.

  Arguments as in `load_balance_loss`; `counted` is averaged as it is.
  """
  real_GS1 = mask_GS[..., None].astype(jnp.float32)
  counted_GSX = jax.lax.stop_gradient(counted_GSX)
  scope, tokens_GS1 = config.balance_scope, _counted(mask_GS, config.loss_padding)[..., None]

  def total(a_GSX):
    if scope == BalanceScope.SEQUENCE:
      return sum_by_run(a_GSX, segment_runs(segment_ids))
    return jnp.sum(a_GSX, axis=1 if scope == BalanceScope.GROUP else (0, 1))

  count = total(tokens_GS1)
  f = total(counted_GSX) / jnp.maximum(count, 1.0)
  if scope == BalanceScope.GLOBAL_BATCH and global_load is not None:
    f = jax.lax.stop_gradient(global_load)
  P = total(probs_GSX * real_GS1) / jnp.maximum(count, 1.0)
  # A scope of padding alone has no load to balance: it must not pull the mean down.
  return P.shape[-1] * jnp.sum(f * P) / jnp.maximum(jnp.sum(count > 0), 1)


def balance_fraction(
  counted_GSE: jax.Array, mask_GS: jax.Array, config: RoutingConfig
) -> jax.Array:
  """Returns f (E,) float32 of all tokens of the call, as `load_balance_loss` counts it."""
  f = mean_over_tokens(counted_GSE, mask_GS, config)
  return f / config.top_k if config.balance_fraction == BalanceFraction.ALL_CHOICES_MEAN else f


def mean_over_tokens(
  counted_GSX: jax.Array, mask_GS: jax.Array, config: RoutingConfig
) -> jax.Array:
  """Returns the mean (X,) over the tokens that losses count, without a gradient."""
  tokens = jnp.maximum(jnp.sum(_counted(mask_GS, config.loss_padding)), 1.0)
  return jax.lax.stop_gradient(jnp.sum(counted_GSX, axis=(0, 1)) / tokens)


def router_z_loss(logits_GSE: jax.Array, mask_GS: jax.Array, padding: LossPadding) -> jax.Array:
  """Returns the mean of logsumexp(logits)^2 over tokens (ST-MoE, arXiv 2202.08906 Eq. 5).

  Logits of zero give (ln E)^2. Taken of the logits without noise, whatever the scores are. Under
  the `flaxformer` convention a masked token has zero logits and is counted, so each adds (ln E)^2
  to the sum.
  """
  logits_GSE = logits_GSE.astype(jnp.float32)
  if padding == LossPadding.FLAXFORMER:
    logits_GSE = logits_GSE * mask_GS[..., None]
  z_GS = jax.nn.logsumexp(logits_GSE, axis=-1)
  counted_GS = _counted(mask_GS, padding)
  return jnp.sum(jnp.square(z_GS) * counted_GS) / jnp.maximum(jnp.sum(counted_GS), 1.0)


def importance_loss(
  importance_GSE: jax.Array, mask_GS: jax.Array, config: RoutingConfig
) -> jax.Array:
  """Returns CV^2 over experts of the sum over tokens (arXiv 1701.06538 Eq. 6-7).

  Per group and averaged over groups under the scope `group`, of all tokens otherwise.

  Args:
    importance_GSE: (G, S, E) float32, weights or scores, 0 for padding.
    mask_GS: (G, S) bool, True = real token.
    config: `balance_scope` and `loss_padding` are read.
  """
  if config.balance_scope == BalanceScope.GROUP:
    # A group of padding alone has nothing to vary: it must not pull the mean down.
    groups = jnp.sum(jnp.any(_counted(mask_GS, config.loss_padding) > 0, axis=1))
    return jnp.sum(squared_variation(jnp.sum(importance_GSE, axis=1))) / jnp.maximum(groups, 1)
  return squared_variation(jnp.sum(importance_GSE, axis=(0, 1)))


def load_loss(
  logits_GSE: jax.Array,
  noisy_GSE: jax.Array,
  std_GSE: jax.Array,
  mask_GS: jax.Array,
  config: RoutingConfig,
) -> jax.Array:
  """Returns CV^2 of sum_x P(x, e), e's probability of selection under new noise on e alone.

  P(x, e) = Phi((logit_e - threshold_e) / std_e) (arXiv 1701.06538 Eq. 8-11).

  Args:
    logits_GSE, noisy_GSE: (G, S, E) float32, without and with noise.
    std_GSE: (G, S, E) float32, the standard deviation of the noise.
    mask_GS: (G, S) bool.
    config: `top_k`, `load_threshold`, `balance_scope` and `loss_padding` are read.
  """
  threshold_GSE = load_threshold(noisy_GSE, config)
  # With K = E every expert is selected whatever the noise. The derivative of an infinite distance
  # by std is NaN, so none may enter the product.
  certain_GSE = threshold_GSE == -jnp.inf
  distance_GSE = (logits_GSE - jnp.where(certain_GSE, 0.0, threshold_GSE)) / std_GSE
  probability_GSE = jnp.where(certain_GSE, 1.0, jax.scipy.stats.norm.cdf(distance_GSE))
  return importance_loss(probability_GSE * mask_GS[..., None], mask_GS, config)


def load_threshold(noisy_GSE: jax.Array, config: RoutingConfig) -> jax.Array:
  """Returns the noisy logit (G, S, E) that each expert must exceed; -inf with K = E."""
  K, E = config.top_k, noisy_GSE.shape[-1]
  exclude = config.load_threshold == LoadThreshold.EXCLUDE_SELF
  top = row_top_k(noisy_GSE, min(K + 1, E))[0]
  kth = top[..., K - 1 : K]
  if not exclude:
    return jnp.broadcast_to(kth, noisy_GSE.shape)
  # Among the K best, the K-th largest of the others is the next one below.
  following = top[..., K : K + 1] if K < E else jnp.full_like(kth, -jnp.inf)
  return jnp.where(noisy_GSE >= kth, following, kth)


def squared_variation(values: jax.Array) -> jax.Array:
  """Returns variance / mean^2 over the last axis (population variance), 0 where all are 0."""
  mean = jnp.mean(values, axis=-1)
  variance = jnp.mean(jnp.square(values - mean[..., None]), axis=-1)
  return jnp.where(mean > 0, variance / jnp.square(jnp.where(mean > 0, mean, 1.0)), 0.0)


def _counted(mask_GS: jax.Array, padding: LossPadding) -> jax.Array:
  if padding == LossPadding.FLAXFORMER:
    return jnp.ones(mask_GS.shape, jnp.float32)
  return mask_GS.astype(jnp.float32)
