"""What a training step changes: parameters, router and optimiser state. No hidden randomness."""

import dataclasses
import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.models import ModelConfig, make_model
from moe_jax.moe.router import RouterState
from moe_jax.training.config import RepairConfig

NO_REPAIR = RepairConfig()


class Stream(enum.IntEnum):
  """What random numbers are drawn for, besides initialisation, which uses the seed's own key.

  The values stand far from the small numbers that splitting a key folds in, so that no two
  purposes share a key.
  """

  STEP = 2**31
  SAMPLE = 2**31 + 1
  REPAIR = 2**31 + 2


def stream_key(seed: int, stream: Stream) -> jax.Array:
  """Returns the random key of one purpose."""
  return jax.random.fold_in(jax.random.key(seed), stream)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RepairState:
  """What the repair of cold experts remembers between steps.

  Attributes:
    load: (MoE layers, E) float32, assignments that asked for each expert since the last repair.
    repaired: int32 scalar, experts repaired since the first step.
  """

  load: jax.Array
  repaired: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state of a run; every random number of a step is a function of (seed, step).

  Attributes:
    step: int32 scalar, optimiser steps done.
    params: the model's parameters, float32: what has a gradient.
    router_state: the model's `RouterState` variables, which rules update (`moe_jax.moe.balance`);
      empty for most routers. No gradient, no optimiser state, no weight decay, no part in the norm
      that clipping reads.
    opt_state: the optimiser's state.
    repair: None unless cold experts are repaired.
  """

  step: jax.Array
  params: nnx.State
  router_state: nnx.State
  opt_state: Any
  repair: RepairState | None

  @property
  def model(self) -> nnx.State:
    """All of the model's variables; with `model_graph` they make it whole."""
    return nnx.merge_state(self.params, self.router_state)


def model_graph(config: ModelConfig) -> nnx.GraphDef:
  """Returns the model without its variables; `nnx.merge(graph, state.model)` makes it whole.

  Configs that differ in routing, dispatch or dropout share parameters, so one set of weights runs
  under several graphs: training capacity, dropless, ...
  """
  return nnx.split(nnx.eval_shape(lambda: make_model(config, key=jax.random.key(0))))[0]


def init_state(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  seed: int,
  repair: RepairConfig = NO_REPAIR,
) -> TrainState:
  """Returns the state before the first step."""
  init = functools.partial(_initial, config, optimizer, seed, repair)
  return jax.jit(init, compiler_options=_init_compiler_options())()


def abstract_state(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  repair: RepairConfig = NO_REPAIR,
) -> TrainState:
  """Returns the shapes and dtypes of the state, without making it: what a restore needs."""
  return jax.eval_shape(functools.partial(_initial, config, optimizer, 0, repair))


def _initial(config, optimizer, seed, repair) -> TrainState:
  model = make_model(config, key=jax.random.key(seed))
  _, params, router_state = nnx.split(model, nnx.Param, RouterState)
  window = None
  if repair.every:
    shape = len(config.moe_layers(train=True)), config.moe.routing.num_experts
    window = RepairState(jnp.zeros(shape, jnp.float32), jnp.int32(0))
  return TrainState(jnp.int32(0), params, router_state, optimizer.init(params), window)


def _init_compiler_options() -> dict[str, str] | None:
  """Initialisation runs once, so optimising it costs more than it gains: 10 seconds on CPU."""
  return {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
