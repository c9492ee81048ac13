"""Balance losses over devices, in float32: of load and of communication (DeepSeek-V2, 2405.04434).

A device here is one of the D' = `num_expert_groups` expert groups, which share a device in the
paper. Padding, scope and accumulation are those of `losses.load_balance_loss`.

| name | weight | formula | uniform routing |
|---|---|---|---|
| `device_balance` | `device_loss_weight` | D' sum_d F_d P_d, sums over experts of d | 1, or K |
| `communication` | `communication_loss_weight` | D' sum_d f_d P_d, f of tokens sent to d | 1 |
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.losses import load_balance_loss, mean_over_tokens, sum_of_products
from moe_jax.moe.scores import by_expert_group


def device_balance_loss(
  probs_GSE: jax.Array,
  counted_GSE: jax.Array,
  mask_GS: jax.Array,
  config: RoutingConfig,
  *,
  segment_ids: jax.Array | None = None,
  global_load: jax.Array | None = None,
) -> jax.Array:
  """Returns the device-level balance loss, a float32 scalar (arXiv 2405.04434 Eq. 26-28).

  The paper's f'_d is the mean of E / K times the share of tokens over a device's experts, so the
  loss is the load-balance loss with devices in place of experts. Arguments as there, where
  `balance_fraction = all_choices_mean` is the paper's.
  """
  probs, counted = (_by_device(a, config) for a in (probs_GSE, counted_GSE))
  load = None if global_load is None else _by_device(global_load, config)
  return load_balance_loss(
    probs, counted, mask_GS, config, segment_ids=segment_ids, global_load=load
  )


def communication_loss(
  probs_GSE: jax.Array,
  asked_GSE: jax.Array,
  mask_GS: jax.Array,
  config: RoutingConfig,
  *,
  segment_ids: jax.Array | None = None,
  global_load: jax.Array | None = None,
) -> jax.Array:
  """Returns the communication balance loss, a float32 scalar (arXiv 2405.04434 Eq. 29-31).

  f''_d is D' / (M T) times the number of tokens sent to device d, however many of its experts they
  ask; M = `top_expert_groups` is the most devices of a token.

  Args:
    probs_GSE, mask_GS, segment_ids: as in `load_balance_loss`.
    asked_GSE: (G, S, E) float32, 1 where a token's assignment counts, all choices.
    config: `top_expert_groups`, `num_expert_groups`, `balance_scope` and `loss_padding` are read.
    global_load: (D',), the `device_fraction` of the whole optimiser step, or None.
  """
  probs, sent = _by_device(probs_GSE, config), _sent(asked_GSE, config)
  return sum_of_products(
    probs, sent, mask_GS, config, segment_ids=segment_ids, global_load=global_load
  )


def device_fraction(asked_GSE: jax.Array, mask_GS: jax.Array, config: RoutingConfig) -> jax.Array:
  """Returns (D',) float32: the share of the call's tokens that is sent to each device, over M."""
  return mean_over_tokens(_sent(asked_GSE, config), mask_GS, config)


def _sent(asked_GSE, config):
  sent_GSD = (_by_device(asked_GSE, config) > 0).astype(jnp.float32)
  return sent_GSD / config.top_expert_groups


def _by_device(values_E, config):
  """Returns the sums (..., D') over the experts (..., E) of each device."""
  return jnp.sum(by_expert_group(values_E, config.num_expert_groups), axis=-1)
