"""A small train state, drawn at random, and folders of checkpoints that hold it."""

import functools
from pathlib import Path

import jax
import numpy as np
from training import tiny

from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.config import CheckpointConfig
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import TrainState, abstract_state

DATA = {"stream": {"next": 3}}


@functools.cache
def template() -> TrainState:
  """The shapes of the smallest state that has everything a run's has."""
  config = tiny.experiment("dense")
  return abstract_state(config.model, make_optimizer(config.optimizer, config.steps))


def drawn(seed: int) -> TrainState:
  """A state of random numbers, so that a changed byte of it matters."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    return jax.numpy.asarray(rng.uniform(-9, 9, leaf.shape).astype(leaf.dtype))

  return jax.tree.map(draw, template())


def save_steps(workdir: Path, steps, **policy) -> None:
  """Saves a step after the other, of values that its number decides."""
  with Checkpoints(workdir, CheckpointConfig(**policy)) as checkpoints:
    for step in steps:
      checkpoints.save(step, drawn(step), DATA | {"step": step}, metric=1 / step)


def assert_same(a, b) -> None:
  """Two trees hold the same arrays, bit for bit."""
  jax.tree.map(np.testing.assert_array_equal, a, b)


def files_of(folder: Path) -> list[Path]:
  """All files of a step, in order."""
  return sorted(path for path in folder.rglob("*") if path.is_file())
