"""Moving experts to other places: a renumbering of all that a training state holds of them.

Weights, router columns, selection bias, tables, the optimiser's memory and the windows over which
loads are counted move alike, so the model computes what it did, see
`moe_jax.moe.expert_permutation`, and no table is needed to find an expert. Over a mesh that splits
experts, a renumbering is what takes them from device to device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

from moe_jax.models import ModelConfig
from moe_jax.models.moe_stacks import MoEStack, moe_stacks
from moe_jax.moe.expert_permutation import check_movable, check_order, column_order, table_order
from moe_jax.training.expert_arrays import Flat, arrays_of_experts, expert_axis, map_optimizer
from moe_jax.training.state import TrainState


def move_experts(
  state: TrainState,
  order: np.ndarray,
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  """Returns the state with place j of MoE layer l holding expert `order[l, j]`; donates the old.

  Every array stays where it was placed, so on a mesh experts travel between devices.

  Args:
    state: where arrays are now.
    order: (MoE layers, E) integers, layers as in `ModelConfig.moe_layers(train=True)`.
    config: the model.
    optimizer: of the state; whatever it keeps must name its axes, as optax keeps moments.

  Raises:
    UserError: a router that names experts by number, or an order that is no permutation or tears
      expert groups apart.
  """
  order = np.asarray(order)
  check_movable(config.moe.routing)
  check_order(order, config.moe.routing)
  return _compiled(config, optimizer, _Places(state))(state, jnp.asarray(order, jnp.int32))


class _Places:
  """The shardings of a state, or None on one device, told apart by their values."""

  def __init__(self, state: TrainState):
    tree = jax.tree.map(lambda a: a.sharding, state)
    self.key = tuple(jax.tree.leaves(tree)), jax.tree.structure(tree)
    # Arrays that are bound to their one device would have every program compiled anew for them.
    on_mesh = any(isinstance(place, NamedSharding) for place in self.key[0])
    self.tree = tree if on_mesh else None

  def __hash__(self):
    return hash(self.key[0])

  def __eq__(self, other):
    return self.key == other.key


@functools.lru_cache(maxsize=4)
def _compiled(config, optimizer, places: _Places):
  permute = functools.partial(_permute, config=config, optimizer=optimizer)
  return jax.jit(permute, donate_argnums=0, out_shardings=places.tree)


def _permute(state: TrainState, order: jax.Array, *, config, optimizer) -> TrainState:
  params = dict(nnx.to_flat_state(state.params))
  router_state = dict(nnx.to_flat_state(state.router_state))
  # None where an array belongs to no expert.
  indices = {path: variable.replace(None) for path, variable in params.items()}
  for stack in moe_stacks(config):
    rows = order[jnp.asarray(stack.layers)]
    for path, variable in arrays_of_experts(params, stack).items():
      index = column_order(
        rows, variable.get_value().shape[expert_axis(variable)], config.moe.routing
      )
      indices[path] = variable.replace(index)
      params[path] = _taken(variable, indices[path])
    _move_router_state(router_state, stack, rows, config)
  return dataclasses.replace(
    state,
    params=nnx.from_flat_state(params.items()),
    router_state=nnx.from_flat_state(router_state.items()),
    opt_state=map_optimizer(
      optimizer, _taken, state.opt_state, nnx.from_flat_state(indices.items())
    ),
    **{name: _moved_window(getattr(state, name), order) for name in ("repair", "placement")},
  )


def _move_router_state(router_state: Flat, stack: MoEStack, rows, config: ModelConfig) -> None:
  """Renumbers a stack's selection bias and table in place."""
  bias, table = ((*stack.path, "router", name) for name in ("bias", "table"))
  if bias in router_state:
    variable = router_state[bias]
    index = column_order(rows, variable.get_value().shape[-1], config.moe.routing)
    router_state[bias] = _taken(variable, variable.replace(index))
  if table in router_state:
    variable = router_state[table]
    router_state[table] = variable.replace(jax.vmap(table_order)(variable.get_value(), rows))


def _taken(kept: nnx.Variable, index: nnx.Variable) -> nnx.Variable:
  """Returns (repeats, ...) with experts in the order (repeats, columns) of `index`, if it has one.

  What an optimiser keeps summed over all experts stays.
  """
  order, axis = index.get_value(), expert_axis(kept)
  if order is None or axis is None:
    return kept

  def of_repeat(pair):
    return jnp.take(*pair, axis=axis - 1)

  # One layer after the other: over a mesh, the experts of one are whole on every device for a time.
  return kept.replace(jax.lax.map(of_repeat, (kept.get_value(), order)))


def _moved_window(window, order: jax.Array):
  """Returns a window with its (MoE layers, E) arrays renumbered.

  Spare slots hold copies of what is now in the places that they name: as good as any others.
  """
  by_expert = {
    name: jnp.take_along_axis(getattr(window, name), order, axis=1)
    for name in ("load", "born")
    if hasattr(window, name)
  }
  return None if window is None else dataclasses.replace(window, **by_expert)
