"""What a training state holds of each expert: weights, router columns, an optimiser's memory.

An array's logical axes tell where its experts are, in parameters and in what an optimiser keeps
beside them, whole (moments) or summed over some axes (factored moments).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.models.moe_stacks import MoEStack

Flat = dict[tuple[str | int, ...], nnx.Variable]


def arrays_of_experts(params: Flat, stack: MoEStack) -> Flat:
  """Returns the variables of a stack that belong to single experts: weights, router columns."""
  depth = len(stack.path)
  return {
    path: variable
    for path, variable in params.items()
    if path[:depth] == stack.path
    and path[depth] in ("experts", "router")
    and expert_axis(variable) is not None
  }


def expert_axis(variable: nnx.Variable) -> int | None:
  """Returns the axis whose places are experts, or router columns; None without."""
  axes = variable.get_metadata()["axes"]
  return next((axes.index(name) for name in ("expert", "router") if name in axes), None)


def over_experts(values: jax.Array, variable: nnx.Variable) -> jax.Array:
  """Returns values (repeats, E), zero for columns that are no expert's, to broadcast to a variable.

  A router has columns that are no expert's: null experts, first-level gates.
  """
  axis, shape = expert_axis(variable), variable.get_value().shape
  values = jnp.pad(values, ((0, 0), (0, shape[axis] - values.shape[1])))
  return values.reshape([n if i in (0, axis) else 1 for i, n in enumerate(shape)])


def map_optimizer(
  optimizer: optax.GradientTransformation,
  function: Callable[[nnx.Variable, nnx.Variable], nnx.Variable],
  opt_state: Any,
  beside: nnx.State,
) -> Any:
  """Returns the optimiser's state with `function(kept, other)` of every variable that it keeps.

  Args:
    optimizer: made the state.
    function: maps what is kept for a parameter, which names its axes, and that parameter's entry.
    opt_state: the state; what belongs to no parameter (step counts) stays.
    beside: a variable for each parameter.
  """
  return optax.tree_map_params(
    optimizer,
    function,
    opt_state,
    beside,
    is_leaf=lambda node: isinstance(node, nnx.Variable),
  )


def along(mask: nnx.Variable, kept: nnx.Variable) -> jax.Array:
  """Returns a parameter's mask, of size 1 on axes that tell nothing, for what was kept of it.

  Axes that the kept array has not are left out; a scalar mask stays one.
  """
  value, axes = mask.get_value(), kept.get_metadata()["axes"]
  if value.ndim == 0:
    return value
  gone = [i for i, name in enumerate(mask.get_metadata()["axes"]) if name not in axes]
  return value[tuple(0 if i in gone else slice(None) for i in range(value.ndim))]
