"""What expert parallelism sends: how many devices a token visits, and how loaded they are.

P devices hold the experts in blocks: device p those from p E/P up to (p + 1) E/P.
"""

import math

import jax
import jax.numpy as jnp

from moe_jax.analysis.router_metrics.arrays import expert_sets, full_mask, masked_mean, ratio
from moe_jax.errors import UserError


def experts_per_device(num_experts: int, num_devices: int) -> int:
  """Returns E / P.

  Raises:
    UserError: the devices do not divide the experts.
  """
  if num_devices < 1 or num_experts % num_devices:
    fits = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
    near = min(fits, key=lambda n: abs(n - num_devices))
    raise UserError(
      f"num_devices = {num_devices} is refused: it must divide num_experts = {num_experts}, for"
      f" example {near}"
    )
  return num_experts // num_devices


def device_counts(counts_E: jax.Array, num_devices: int) -> jax.Array:
  """Sums the counts (..., E) of the experts of each device: (..., P).

  Raises:
    UserError: the devices do not divide the experts.
  """
  width = experts_per_device(counts_E.shape[-1], num_devices)
  return jnp.sum(counts_E.reshape(*counts_E.shape[:-1], num_devices, width), axis=-1)


def mean_distinct_devices(
  expert: jax.Array, num_experts: int, num_devices: int, asked: jax.Array | None = None
) -> jax.Array:
  """Returns the mean number of devices that a token is sent to, over tokens that ask at all.

  Each costs one copy of the token if copies to a device are shared by its experts. Node-limited
  routing (DeepSeek-V3, arXiv 2412.19437 section 2.1.2) bounds it by M = 4. At random:
  `expected_distinct_devices`.

  Args:
    expert: (..., K) expert ids.
    num_experts: E.
    num_devices: P.
    asked: (..., K) bool, False for padding and choices that were not made.

  Raises:
    UserError: a mask that does not fit, or devices that do not divide the experts.
  """
  width = experts_per_device(num_experts, num_devices)
  asked = full_mask(asked, expert.shape, "asked")
  devices = expert_sets(expert // width, num_devices, asked)
  return masked_mean(jnp.sum(devices, axis=-1), jnp.any(asked, axis=-1))


def expected_distinct_devices(num_experts: int, top_k: int, num_devices: int) -> float:
  """Returns P (1 - C(E - E/P, K) / C(E, K)): K distinct experts at random, exactly.

  For many experts a device this is P (1 - (1 - 1/P)^K).

  Raises:
    UserError: the devices do not divide the experts.
  """
  elsewhere = num_experts - experts_per_device(num_experts, num_devices)
  missed = math.comb(elsewhere, top_k) / math.comb(num_experts, top_k)
  return num_devices * (1.0 - missed)


def cross_device_fraction(
  expert: jax.Array,
  token_device: jax.Array,
  num_experts: int,
  num_devices: int,
  asked: jax.Array | None = None,
) -> jax.Array:
  """Returns the fraction of assignments whose expert is not on its token's device.

  At random: `expected_cross_device_fraction`.

  Args:
    expert: (..., K) expert ids.
    token_device: (...) integers below P, the device that holds each token.
    num_experts: E.
    num_devices: P.
    asked: (..., K) bool.

  Raises:
    UserError: shapes that do not fit, or devices that do not divide the experts.
  """
  width = experts_per_device(num_experts, num_devices)
  if token_device.shape != expert.shape[:-1]:
    raise UserError(
      f"token_device has shape {token_device.shape}; expected {expert.shape[:-1]}, one a token"
    )
  asked = full_mask(asked, expert.shape, "asked")
  away = (expert // width != token_device[..., None]) & asked
  return ratio(jnp.sum(away), jnp.sum(asked))


def expected_cross_device_fraction(num_devices: int) -> float:
  """Returns 1 - 1/P."""
  return 1.0 - 1.0 / num_devices
