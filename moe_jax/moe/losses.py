"""Router losses: load balance (Switch, GShard) and router z-loss, over real tokens, in float32."""

import jax
import jax.numpy as jnp

from moe_jax.moe.types import BalanceFraction, BalanceScope, LossPadding, RoutingConfig


def load_balance_loss(
  probs_GSE: jax.Array,
  expert_GSK: jax.Array,
  mask_GS: jax.Array,
  config: RoutingConfig,
) -> jax.Array:
  """Returns E * sum_e f_e P_e, a float32 scalar.

  f_e is the fraction of tokens that ask for expert e before any drop, P_e the mean probability of
  e; only P carries a gradient (Switch, arXiv 2101.03961 Eq. 4-6). GShard's auxiliary loss
  (arXiv 2006.16668 Algorithm 1, `l_aux`) is this one with f from first choices, per group, divided
  by E^2. Uniform routing gives 1, or K with `all_choices`.

  Args:
    probs_GSE: (G, S, E) float32 that sum to 1 over E.
    expert_GSK: (G, S, K) int32, the selected experts.
    mask_GS: (G, S) bool, True = real token.
    config: the `balance_*` fields and `loss_padding` are read.
  """
  first = config.balance_fraction == BalanceFraction.FIRST_CHOICE
  counted_GSK = expert_GSK[..., :1] if first else expert_GSK
  real_GS1 = mask_GS[..., None].astype(jnp.float32)
  asked_GSE = jnp.sum(jax.nn.one_hot(counted_GSK, config.num_experts), axis=2) * real_GS1
  if config.balance_fraction == BalanceFraction.ALL_CHOICES_MEAN:
    asked_GSE = asked_GSE / config.top_k
  axes = (0, 1) if config.balance_scope == BalanceScope.BATCH else (1,)
  count = jnp.sum(_counted(mask_GS, config.loss_padding), axis=axes)[..., None]
  f = jnp.sum(asked_GSE, axis=axes) / jnp.maximum(count, 1.0)
  P = jnp.sum(probs_GSE * real_GS1, axis=axes) / jnp.maximum(count, 1.0)
  # A group of padding alone has no load to balance: it must not pull the mean down.
  groups = jnp.maximum(jnp.sum(count > 0), 1)
  return config.num_experts * jnp.sum(f * P) / groups


def router_z_loss(logits_GSE: jax.Array, mask_GS: jax.Array, padding: LossPadding) -> jax.Array:
  """Returns the mean of logsumexp(logits)^2 over tokens (ST-MoE, arXiv 2202.08906 Eq. 5).

  Logits of zero give (ln E)^2. Under the `flaxformer` convention a masked token has zero logits
  and is counted, so each adds (ln E)^2 to the sum.
  """
  logits_GSE = logits_GSE.astype(jnp.float32)
  if padding == LossPadding.FLAXFORMER:
    logits_GSE = logits_GSE * mask_GS[..., None]
  z_GS = jax.nn.logsumexp(logits_GSE, axis=-1)
  counted_GS = _counted(mask_GS, padding)
  return jnp.sum(jnp.square(z_GS) * counted_GS) / jnp.maximum(jnp.sum(counted_GS), 1.0)


def _counted(mask_GS: jax.Array, padding: LossPadding) -> jax.Array:
  if padding == LossPadding.FLAXFORMER:
    return jnp.ones(mask_GS.shape, jnp.float32)
  return mask_GS.astype(jnp.float32)
