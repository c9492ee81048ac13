"""Steps of a small MoE model that is balanced in every way, on microbatches of unequal size."""

import functools

import numpy as np
from training import tiny
from training.steps import compiled_step, fresh, make_batch

from moe_jax.training.config import ExperimentConfig

NUM_LAYERS = 2
# Real tokens of the four rows; with as many microbatches the first one is padding alone.
REAL = np.array([0, 9, 27, 27])


def experiment(**fields) -> ExperimentConfig:
  """Returns a model of two dropless MoE blocks."""
  return tiny.experiment(
    **dict(model__segments=(("attention:moe", NUM_LAYERS),), moe__overflow="dropless") | fields
  )


def balanced(**fields) -> ExperimentConfig:
  """Returns one with a selection bias, an adaptive coefficient, and a large balance loss."""
  return experiment(
    **dict(
      moe__bias_update="sign",
      moe__bias_rate=0.5,
      moe__adaptive_target=1e-3,
      moe__balance_loss_weight=10.0,
      moe__balance_scope="batch",
      optimizer__clip_norm=0.0,
    )
    | fields
  )


def uneven_batch() -> dict[str, np.ndarray]:
  """Returns a batch of four rows with REAL real tokens each."""
  batch = make_batch()
  padding = np.arange(batch["tokens"].shape[1]) >= REAL[:, None]
  for name in ("segment_ids", "loss_mask"):
    batch[name] = np.where(padding, 0, batch[name]).astype(np.int32)
  return batch


@functools.cache
def first_step(**fields):
  """Returns the state after the first step of `balanced(**fields)`, and its metrics."""
  state, step = compiled_step(balanced(**fields))
  state, metrics = step(fresh(state), uneven_batch())
  return state, {name: np.asarray(value) for name, value in metrics.items()}


def router_variable(state, name: str) -> np.ndarray:
  """Returns a `RouterState` variable of all MoE layers, stacked."""
  router = state.router_state["segments"][0]["blocks"][0]["feed_forward"]["router"]
  return np.asarray(router[name].get_value())


def router_gradient(state) -> np.ndarray:
  """Returns Adam's first moment of the router, (1 - b1) times the gradient after one step."""
  (adam,) = [part for part in state.opt_state if hasattr(part, "mu")]
  router = adam.mu["segments"][0]["blocks"][0]["feed_forward"]["router"]
  return np.asarray(router["kernel"].get_value())
