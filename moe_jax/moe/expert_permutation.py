"""Renumbering of experts: which routers it leaves as they were, and how their columns follow.

A router whose columns move with the experts makes the same choices under other numbers. What it
decides by the number itself is another matter: equal scores go to the lower number, and noise is
drawn for places, so a run goes on with other draws of the same distribution. Sums over experts
change their order, and with it the last bit.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.registry import Chooser


def check_movable(config: RoutingConfig) -> None:
  """Refuses a router that names experts by number, or that has no load to balance.

  Raises:
    UserError: a selection by hash, by chance, by record, by experts or by slots, or one by table
      with several choices, which are consecutive numbers.
  """
  selector, name = config.selector, f"selection = {config.selection}"
  if selector.chooser != Chooser.TOKEN:
    raise UserError(f"experts are not moved with {name}, where each has as many tokens as the next")
  if config.selection == "table":
    if config.top_k > 1:
      raise UserError(
        f"experts are not moved with {name} and top_k = {config.top_k}, whose choices are"
        " consecutive numbers; use top_k = 1"
      )
  elif not selector.learned or selector.needs_expert_ids:
    raise UserError(
      f"experts are not moved with {name}, which names them by number; use a selection such as"
      " top_k"
    )


def check_order(order: np.ndarray, config: RoutingConfig) -> None:
  """Refuses what is no permutation, or tears an expert group apart.

  Args:
    order: (X, E) integers, the expert that each place is to hold.
    config: of the router.

  Raises:
    UserError: see above.
  """
  E, groups = config.num_experts, config.num_expert_groups
  if order.ndim != 2 or not (np.sort(order) == np.arange(E)).all():
    raise UserError(
      f"order of shape {order.shape} is refused: every row must name each of the {E} experts once"
    )
  of_place = order.reshape(len(order), groups, -1) // (E // groups)
  torn = np.argwhere((of_place != of_place[..., :1]).any(axis=-1))
  if torn.size:
    layer, group = torn[0]
    raise UserError(
      f"row {layer} of order is refused: it puts experts of groups"
      f" {sorted(set(of_place[layer, group].tolist()))} into the places of group {group}, and"
      f" num_expert_groups = {groups} has groups of consecutive experts"
    )


def column_order(order: jax.Array, num_columns: int, config: RoutingConfig) -> jax.Array:
  """Returns (X, num_columns) int32: the order of a router's columns that follows (X, E) experts.

  First-level gates of `hierarchical` follow their groups, null experts stay.
  """
  E, groups = config.num_experts, config.num_expert_groups
  rest = jnp.broadcast_to(
    jnp.arange(E, num_columns, dtype=jnp.int32), (len(order), num_columns - E)
  )
  if config.selection == "hierarchical":
    rest = E + order[:, :: E // groups] // (E // groups)
  return jnp.concatenate([order.astype(jnp.int32), rest[:, : num_columns - E]], axis=1)


def table_order(table: jax.Array, order: jax.Array) -> jax.Array:
  """Returns a table (V,) of expert numbers for experts in the order (E,)."""
  return jnp.argsort(order).astype(table.dtype)[table]
