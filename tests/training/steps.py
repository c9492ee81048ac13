"""Batches, and steps that are compiled once for a config, for tests of the training step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.packing import FIELDS
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import abstract_state, init_state
from moe_jax.training.step import make_train_step


def make_batch(seed: int = 0, rows: int = 4, length: int = 32) -> dict[str, np.ndarray]:
  """Random tokens in two documents a row, the last five positions padding."""
  rng = np.random.default_rng(seed)
  steps = np.arange(length)
  segment = np.where(steps < 12, 1, 2) * (steps < length - 5)
  batch = {
    "tokens": rng.integers(3, 259, (rows, length)),
    "targets": rng.integers(3, 259, (rows, length)),
    "segment_ids": np.tile(segment, (rows, 1)),
    "positions": np.tile(np.where(steps < 12, steps, steps - 12), (rows, 1)),
    "loss_mask": np.tile((segment > 0) & (steps != 11), (rows, 1)),
  }
  assert set(batch) == set(FIELDS)
  return {name: value.astype(np.int32) for name, value in batch.items()}


@functools.cache
def compiled_step(config):
  """Returns (state before the first step, compiled step); call `fresh` on the state."""
  optimizer = make_optimizer(config.optimizer, config.steps)
  rows = dict(batch_size=config.batch_size // config.accumulation_steps, accumulation_steps=1)
  return initial_state(dataclasses.replace(config, **rows)), make_train_step(config, optimizer)


@functools.cache
def initial_state(config):
  """Returns the state before the first step, which accumulation does not change."""
  optimizer = make_optimizer(config.optimizer, config.steps)
  return init_state(config.model, optimizer, config.seed, config.repair)


def drawn_state(config, optimizer):
  """Returns a state at step 1 whose every array is drawn, which compiles nothing."""
  template = abstract_state(
    config.model, optimizer, config.repair, balance=config.balance_placement
  )
  rng = np.random.default_rng(0)

  def draw(a):
    if jnp.issubdtype(a.dtype, jnp.integer):
      return jnp.asarray(rng.integers(0, 4, a.shape), a.dtype)
    # Positive, as second moments are.
    return jnp.asarray(0.3 * np.abs(rng.standard_normal(a.shape)), a.dtype)

  state = jax.tree.map(draw, template)
  # Parameters do not depend on what else there is.
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda a: jnp.asarray(0.3 * rng.standard_normal(a.shape), a.dtype), template.params
  )
  return dataclasses.replace(state, step=jnp.int32(1), params=params)


def fresh(state):
  """Returns a copy of a state: the step donates the one it is given."""
  return jax.tree.map(jnp.copy, state)


def one_step(config, batch, steps: int = 1):
  state, step = compiled_step(config)
  state = fresh(state)
  for _ in range(steps):
    state, metrics = step(state, batch)
  return state, jax.device_get(metrics)
