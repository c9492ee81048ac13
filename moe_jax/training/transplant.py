"""The state of a run after an operation on its model: what training goes on from."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moe_jax.convert.rules import flat_leaves
from moe_jax.convert.surgery import Operation, Role
from moe_jax.convert.surgery.layer_trees import Leaves
from moe_jax.errors import UserError
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import TrainState, abstract_state, new_windows


class Moments(enum.StrEnum):
  """What becomes of the optimiser's moments."""

  CARRY = "carry"  # they follow the parameters; those of what is new are zero
  RESET = "reset"  # zero everywhere, and bias correction starts anew


class Schedule(enum.StrEnum):
  """Where the target stands in its training."""

  KEEP = "keep"  # at the source's step of the schedule, and at its place in the data
  RESET = "reset"  # before the first step


def transplant(
  state: TrainState,
  operation: Operation,
  config: ExperimentConfig,
  *,
  moments: Moments = Moments.CARRY,
  schedule: Schedule = Schedule.KEEP,
) -> TrainState:
  """Returns the state of the target's run.

  The windows over which loads are counted start anew.

  Args:
    state: of the source's run.
    operation: from the source's model to that of `config`.
    config: the target's run.
    moments: what becomes of Adam's moments and the number of updates they are corrected for.
    schedule: what becomes of the step, which the learning rate follows.

  Raises:
    UserError: moments are to be carried that are not Adam's.
  """
  optimizer = make_optimizer(config.optimizer, config.steps)
  template = abstract_state(config.model, optimizer)
  values = operation.apply(host_leaves(state.model))
  params = _filled(template.params, values)
  opt_state = optimizer.init(params)
  if moments == Moments.CARRY:
    opt_state = _with_moments(opt_state, _adam(state.opt_state), operation, template.params)
  step = state.step if schedule == Schedule.KEEP else jnp.int32(0)
  return TrainState(
    step,
    params,
    _filled(template.router_state, values),
    _at_step(opt_state, step),
    *new_windows(config.model, config.repair, config.balance_placement),
  )


def host_leaves(state: Any) -> Leaves:
  """Returns the arrays of a model or a state on the host, by their places."""
  return {path: np.asarray(array) for path, array in flat_leaves(state).items()}


def _filled(template: nnx.State, leaves: Leaves) -> nnx.State:
  """Returns a state like the template with these arrays."""
  return nnx.from_flat_state(
    (path, variable.replace(jnp.asarray(leaves[path], variable.get_value().dtype)))
    for path, variable in nnx.to_flat_state(template)
  )


def _with_moments(opt_state, source: optax.ScaleByAdamState, operation: Operation, template):
  """Returns the optimiser's state with the source's moments and their count."""
  mean = _filled(template, operation.apply(host_leaves(source.mu), Role.FIRST_MOMENT))
  square = _filled(template, operation.apply(host_leaves(source.nu), Role.SECOND_MOMENT))
  return _replaced(
    opt_state,
    optax.ScaleByAdamState,
    lambda own: own._replace(count=source.count, mu=mean, nu=square),
  )


def _at_step(opt_state, step: jax.Array):
  """Returns the optimiser's state at a step of the learning rate's schedule."""
  return _replaced(opt_state, optax.ScaleByScheduleState, lambda own: own._replace(count=step))


def _adam(opt_state) -> optax.ScaleByAdamState:
  found = []
  _replaced(opt_state, optax.ScaleByAdamState, lambda own: found.append(own) or own)
  if not found:
    raise UserError(
      "moments = carry is refused for a run whose optimizer.name is not adamw: its statistics sum"
      " over what an operation adds or takes away; use moments = reset"
    )
  (adam,) = found
  return adam


def _replaced(opt_state, kind: type, replace):
  """Returns the optimiser's state with the parts of one kind replaced."""
  return jax.tree.map(
    lambda part: replace(part) if isinstance(part, kind) else part,
    opt_state,
    is_leaf=lambda part: isinstance(part, kind),
  )
