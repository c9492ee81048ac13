"""What a training step changes: parameters, optimiser state, step number. No hidden randomness."""

import dataclasses
import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.models import Decoder, ModelConfig


class Stream(enum.IntEnum):
  """What random numbers are drawn for, besides initialisation, which uses the seed's own key.

  The values stand far from the small numbers that splitting a key folds in, so that no two
  purposes share a key.
  """

  STEP = 2**31
  SAMPLE = 2**31 + 1


def stream_key(seed: int, stream: Stream) -> jax.Array:
  """Returns the random key of one purpose."""
  return jax.random.fold_in(jax.random.key(seed), stream)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state of a run; every random number of a step is a function of (seed, step).

  Attributes:
    step: int32 scalar, optimiser steps done.
    params: the model's parameters, float32.
    opt_state: the optimiser's state.
  """

  step: jax.Array
  params: nnx.State
  opt_state: Any


def model_graph(config: ModelConfig) -> nnx.GraphDef:
  """Returns the model without its parameters; `nnx.merge(graph, params)` makes it whole.

  Configs that differ in routing, dispatch or dropout share parameters, so one set of weights runs
  under several graphs: training capacity, dropless, ...
  """
  return nnx.split(nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0))))[0]


def init_state(
  config: ModelConfig, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
  """Returns the state before the first step."""
  init = functools.partial(_initial, config, optimizer, seed)
  return jax.jit(init, compiler_options=_init_compiler_options())()


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the shapes and dtypes of the state, without making it: what a restore needs."""
  return jax.eval_shape(functools.partial(_initial, config, optimizer, 0))


def _initial(config, optimizer, seed) -> TrainState:
  params = nnx.split(Decoder(config, key=jax.random.key(seed)))[1]
  return TrainState(jnp.int32(0), params, optimizer.init(params))


def _init_compiler_options() -> dict[str, str] | None:
  """Initialisation runs once, so optimising it costs more than it gains: 10 seconds on CPU."""
  return {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
