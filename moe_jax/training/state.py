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
from moe_jax.sharding.layout import Layout
from moe_jax.training.config import BalancePlacementConfig, RepairConfig

NO_REPAIR = RepairConfig()
NO_BALANCE = BalancePlacementConfig()


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
class PlacementState:
  """What the balancing of devices remembers between steps.

  Attributes:
    load: (MoE layers, E) float32, assignments that asked for each expert since the last balancing.
    born: (MoE layers, E) int32, the number that the expert in each place had at first.
    copied: (MoE layers, spare) int32, the experts that spare slots hold copies of; None without.
  """

  load: jax.Array
  born: jax.Array
  copied: jax.Array | None = None


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
    placement: None unless experts move between devices.
  """

  step: jax.Array
  params: nnx.State
  router_state: nnx.State
  opt_state: Any
  repair: RepairState | None
  placement: PlacementState | None = None

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
  layout: Layout | None = None,
  balance: BalancePlacementConfig = NO_BALANCE,
) -> TrainState:
  """Returns the state before the first step, each parameter born where the layout wants it."""
  init = functools.partial(_initial, config, optimizer, seed, repair, balance)
  places = None if layout is None else state_shardings(jax.eval_shape(init), layout)
  return jax.jit(init, out_shardings=places, compiler_options=_init_compiler_options())()


def abstract_state(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  repair: RepairConfig = NO_REPAIR,
  layout: Layout | None = None,
  balance: BalancePlacementConfig = NO_BALANCE,
) -> TrainState:
  """Returns the shapes, dtypes and places of the state, without making it: for a restore.

  Raises:
    UserError: a parameter that the mesh does not divide.
  """
  state = jax.eval_shape(functools.partial(_initial, config, optimizer, 0, repair, balance))
  if layout is None:
    return state

  def placed(shape, sharding):
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

  return jax.tree.map(placed, state, state_shardings(state, layout))


def state_shardings(state: TrainState, layout: Layout) -> TrainState:
  """Returns where each array of a state lives: an optimiser's moments beside their parameters.

  Router state is on every device, which all of them read.

  Raises:
    UserError: a parameter that the mesh does not divide.
  """
  whole = jax.tree.map(lambda _: layout.replicated, state)
  return dataclasses.replace(
    whole, params=layout.of_tree(state.params), opt_state=layout.of_tree(state.opt_state)
  )


def _initial(config, optimizer, seed, repair, balance) -> TrainState:
  model = make_model(config, key=jax.random.key(seed))
  _, params, router_state = nnx.split(model, nnx.Param, RouterState)
  opt_state = optimizer.init(params)
  windows = new_windows(config, repair, balance)
  return TrainState(jnp.int32(0), params, router_state, opt_state, *windows)


def new_windows(
  config: ModelConfig, repair: RepairConfig, balance: BalancePlacementConfig
) -> tuple[RepairState | None, PlacementState | None]:
  """Returns the windows over which loads are counted, before the first step; None without."""
  if not repair.every and not balance.every:
    return None, None
  shape = len(config.moe_layers(train=True)), config.moe.routing.num_experts
  load, born = jnp.zeros(shape, jnp.float32), jnp.arange(shape[1], dtype=jnp.int32)
  copied = None
  if balance.spare:
    # Before any load is known, copies of no use: a slot must hold something.
    copied = jnp.zeros((shape[0], balance.spare), jnp.int32)
  return (
    RepairState(load, jnp.int32(0)) if repair.every else None,
    PlacementState(load, jnp.broadcast_to(born, shape), copied) if balance.every else None,
  )


def _init_compiler_options() -> dict[str, str] | None:
  """Initialisation runs once, so optimising it costs more than it gains: 10 seconds on CPU."""
  return {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
