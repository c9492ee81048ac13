"""Routing groups: which tokens compete for the same slots. Static shapes, never the mesh's."""

import jax
import jax.numpy as jnp

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import Grouping


def to_groups(a: jax.Array, config: RoutingConfig) -> jax.Array:
  """Reshapes (B, L, ...) to (G, S, ...).

  `fixed` groups are consecutive tokens of the flattened batch; the last one is filled with zeros
  (for a mask: False), so padding is never routed. A call with fewer tokens than `group_size` is
  one group of its own size.
  """
  if config.grouping == Grouping.SEQUENCE:
    return a
  tokens = a.reshape((1, -1) + a.shape[2:])
  if config.grouping == Grouping.BATCH or tokens.shape[1] <= config.group_size:
    return tokens
  missing = -tokens.shape[1] % config.group_size
  padded = jnp.pad(tokens, [(0, 0), (0, missing)] + [(0, 0)] * (a.ndim - 2))
  return padded.reshape((-1, config.group_size) + a.shape[2:])


def from_groups(y_GSD: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Reshapes (G, S, D) back to (B, L, D) and cuts the filling off."""
  B, L, D = shape
  return y_GSD.reshape(-1, D)[: B * L].reshape(B, L, D)
