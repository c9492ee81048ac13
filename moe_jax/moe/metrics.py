"""Router metrics: float32 scalars and (E,) vectors of one call of one layer, over real tokens.

| name | meaning | uniform routing |
|---|---|---|
| `load` (E,) | fraction of assignments that ask for each expert, before any drop | 1/E |
| `assignments` | assignments asked for, the denominator of `load` | |
| `load_entropy` | entropy of `load` / ln E | 1 |
| `max_violation` | max load / mean load - 1 (arXiv 2408.15664 Eq. 4) | `max_violation_floor` |
| `max_violation_floor` | its expectation when S*G*K assignments fall at random; static | |
| `dropped_fraction` | fraction of the assignments asked for that got no slot | 0 |
| `dropped_token_fraction` | fraction of tokens that asked and got no slot at all | 0 |
| `unrouted_fraction` | fraction of tokens that no expert sees, for whatever reason | 0 |
| `experts_per_token` | mean number of experts that see a token | K |
| `dead_experts` | number of experts nobody asked for | 0 |
| `router_confidence` | mean over tokens of the largest probability | about 1/E |
| `capacity_utilization` | filled slots / all slots | |
| `slots_per_assignment` | all slots / (K * real tokens): below 1, K choices a token cannot fit | |
| `effective_capacity_factor` | C*E/S, or C*E/(K*S): the factor after rounding; static | |

Without a real token all are 0 but `dead_experts` (E), the static ones, and the entropy of E = 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import CapacityConvention


def routing_metrics(
  probs_GSE: jax.Array,
  asked_GSE: jax.Array,
  kept_GSE: jax.Array,
  mask_GS: jax.Array,
  capacity: int,
  config: RoutingConfig,
) -> dict[str, jax.Array]:
  """Returns the metrics of the table above.

  Args:
    probs_GSE: (G, S, E) float32.
    asked_GSE: (G, S, E) float32, 1 where a real token asked for an expert at first.
    kept_GSE: (G, S, E) float32, 1 where it has a slot of that expert in the end.
    mask_GS: (G, S) bool.
    capacity: C.
    config: `top_k` and `capacity_convention` are read.
  """
  G, S, E = probs_GSE.shape
  count_E = jnp.sum(asked_GSE, axis=(0, 1))
  asked, kept, real = jnp.sum(asked_GSE), jnp.sum(kept_GSE), jnp.sum(mask_GS)
  load_E = count_E / jnp.maximum(asked, 1.0)
  alone_GS = mask_GS & ~jnp.any(kept_GSE > 0, axis=-1)
  lost_GS = alone_GS & jnp.any(asked_GSE > 0, axis=-1)
  slots = G * E * capacity
  per_token = config.capacity_convention == CapacityConvention.PER_TOKEN
  confidence_GS = jnp.max(probs_GSE, axis=-1) * mask_GS
  tokens = jnp.maximum(real, 1)
  metrics = {
    "load": load_E,
    "assignments": asked,
    **load_statistics(load_E),
    "max_violation_floor": max_violation_floor(G * S * config.top_k, E),
    "dropped_fraction": (asked - kept) / jnp.maximum(asked, 1.0),
    "dropped_token_fraction": jnp.sum(lost_GS) / tokens,
    "unrouted_fraction": jnp.sum(alone_GS) / tokens,
    "experts_per_token": kept / tokens,
    "router_confidence": jnp.sum(confidence_GS) / tokens,
    "capacity_utilization": kept / slots,
    # Padding asks for nothing, so counting it would announce drops that cannot happen.
    "slots_per_assignment": jnp.where(real > 0, slots / (config.top_k * tokens), 0.0),
    "effective_capacity_factor": slots / (G * S * (1 if per_token else config.top_k)),
  }
  return jax.lax.stop_gradient({k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()})


def load_statistics(load_E: jax.Array) -> dict[str, jax.Array]:
  """Returns `load_entropy`, `max_violation` and `dead_experts` of a load vector (E,).

  Apart from `routing_metrics`, because loads add up over microbatches and these do not.
  """
  return {
    "load_entropy": _normalized_entropy(load_E),
    "max_violation": jnp.where(jnp.any(load_E > 0), load_E.shape[0] * jnp.max(load_E) - 1.0, 0.0),
    "dead_experts": jnp.sum(load_E == 0).astype(jnp.float32),
  }


def _normalized_entropy(load_E: jax.Array) -> jax.Array:
  if load_E.shape[0] == 1:
    return jnp.float32(1.0)
  # xlogy(0, 0) = 0: a dead expert adds nothing.
  entropy = -jnp.sum(jax.scipy.special.xlogy(load_E, load_E))
  return entropy / np.log(load_E.shape[0])


@functools.lru_cache(maxsize=256)
def max_violation_floor(num_assignments: int, num_experts: int) -> float:
  """Returns the expected max violation of `num_assignments` uniform random assignments.

  Even a perfect router shows this much, because a batch is a finite sample: 0.089 for 2,048
  assignments to 8 experts, 0.44 to 64. Monte Carlo of 1,000 draws with a fixed seed (standard
  error below 2 %).
  """
  draws = np.random.default_rng(0).multinomial(
    num_assignments, [1.0 / num_experts] * num_experts, size=1000
  )
  return float(draws.max(axis=1).mean() * num_experts / num_assignments - 1.0)
