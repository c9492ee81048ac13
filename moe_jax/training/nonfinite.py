"""Steps whose loss, gradients or updates are not finite: found on the device, undone there."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.errors import DivergedRun
from moe_jax.training.state import TrainState

# The metric that tells it; taken out before a row is written.
FINITE = "finite"


def is_finite(loss: jax.Array, grad_norm: jax.Array, updates: Any = None) -> jax.Array:
  """Returns a bool scalar: whether a step may be applied.

  Args:
    loss: of the whole batch, float32 scalar.
    grad_norm: of all gradients, float32 scalar; it is not finite if one of them is not.
    updates: of the parameters; None = not looked at.
  """
  total = loss + grad_norm
  return jnp.isfinite(total if updates is None else total + optax.tree.norm(updates))


def keep_old_unless(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
  """Returns the new state, or the old one with the new one's number of steps.

  Learning rates and moments go by the updates that were made: they do not count the step either.
  """
  kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
  return dataclasses.replace(kept, step=new.step)


def check_finite(step: int, metrics: Mapping[str, Any]) -> None:
  """Stops a run that has diverged, before a row or a checkpoint of it is written.

  Raises:
    DivergedRun: a metric, or an element of one, is not finite; names the first.
  """
  for name, value in metrics.items():
    values = np.ravel([] if value is None else value)
    faults = values[~np.isfinite(values)]
    if faults.size:
      raise DivergedRun(
        f"{name} is {faults[0]} at step {step}: the run has diverged; lower"
        " optimizer.learning_rate or optimizer.clip_norm and start in a new workdir"
      )


def as_missing(row: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a row with None for every number that is not finite: JSON has no other word for it."""

  def clean(value):
    if isinstance(value, list):
      return [clean(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value

  return {name: clean(value) for name, value in row.items()}
