"""Repair of cold experts: those that few tokens asked for since the last repair start anew.

An expert that gets no token gets no gradient, so it stays as bad as it is. Every `repair.every`
steps the experts of a layer whose load is below `repair.threshold` of the layer's mean load are
replaced, their column of the router with them, and the optimiser forgets them. All other experts
keep weights and moments bit for bit. What is drawn is a function of (seed, step).
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.models.moe_stacks import MoEStack, moe_stacks
from moe_jax.moe import MoELayer
from moe_jax.moe.router import RouterState
from moe_jax.training.config import ExperimentConfig, RepairInit
from moe_jax.training.expert_arrays import (
  Flat,
  along,
  arrays_of_experts,
  expert_axis,
  map_optimizer,
  over_experts,
)
from moe_jax.training.layer_metrics import LayerMetrics, load_counts
from moe_jax.training.state import PlacementState, RepairState, Stream, TrainState, stream_key

LoadWindow = TypeVar("LoadWindow", RepairState, PlacementState, None)


def count_load(window: LoadWindow, layers: list[LayerMetrics]) -> LoadWindow:
  """Adds a step's loads to a window's `load`."""
  if window is None:
    return None
  counts = jnp.stack([load_counts(layer) for layer in layers])
  return dataclasses.replace(window, load=window.load + counts)


def repair_cold_experts(
  state: TrainState, optimizer: optax.GradientTransformation, config: ExperimentConfig
) -> TrainState:
  """Replaces cold experts if the step is one of `repair.every`, and starts a new window.

  Lossy: what a cold expert had learnt is gone. `RepairState.repaired` counts them.
  """
  if state.repair is None:
    return state
  # A run must not end on experts that have just been perturbed.
  due = (state.step % config.repair.every == 0) & (state.step < config.steps)
  return jax.lax.cond(due, lambda s: _repair(s, optimizer, config), lambda s: s, state)


def cold_experts(load: jax.Array, threshold: float) -> jax.Array:
  """Returns (MoE layers, E) bool: loads (MoE layers, E) below `threshold` of the layer's mean."""
  return load < threshold * jnp.mean(load, axis=-1, keepdims=True)


def _repair(state, optimizer, config) -> TrainState:
  load = state.repair.load
  cold = cold_experts(load, config.repair.threshold)
  params = dict(nnx.to_flat_state(state.params))
  router_state = dict(nnx.to_flat_state(state.router_state))
  reset = {path: variable.replace(jnp.bool_(False)) for path, variable in params.items()}
  root = jax.random.fold_in(stream_key(config.seed, Stream.REPAIR), state.step)
  for index, stack in enumerate(moe_stacks(config.model)):
    rows = jnp.asarray(stack.layers)
    old = arrays_of_experts(params, stack)
    key = jax.random.fold_in(root, index)
    for path, new in _replacements(old, stack, jnp.argmax(load[rows], -1), key, config).items():
      reset[path] = old[path].replace(over_experts(cold[rows], old[path]))
      params[path] = _select(reset[path], new, old[path])
    bias = (*stack.path, "router", "bias")
    if bias in router_state:
      router_state[bias] = _repair_bias(router_state[bias], load[rows], cold[rows], config)
  return dataclasses.replace(
    state,
    params=nnx.from_flat_state(params.items()),
    router_state=nnx.from_flat_state(router_state.items()),
    opt_state=_forget(state.opt_state, optimizer, nnx.from_flat_state(reset.items())),
    repair=RepairState(jnp.zeros_like(load), state.repair.repaired + jnp.sum(cold)),
  )


def _replacements(old: Flat, stack: MoEStack, hottest: jax.Array, key, config) -> dict:
  """Returns what a cold expert becomes, for every array of `old`, broadcast over its experts."""
  if config.repair.init == RepairInit.FRESH:
    fresh = _fresh_layers(stack, key, config)
    return {path: fresh[path] for path in old}
  keys = jax.random.split(key, len(old))
  return {
    path: _noisy_copy(variable, hottest, k, config.repair.noise)
    for (path, variable), k in zip(old.items(), keys, strict=True)
  }


def _fresh_layers(stack: MoEStack, key, config) -> dict:
  model = config.model

  def parameters(key):
    layer = MoELayer(model.model_dim, model.moe, key=key, init_scale=model.init_scale)
    return nnx.split(layer, nnx.Param, RouterState)[1]

  state = jax.vmap(parameters)(jax.random.split(key, len(stack.layers)))
  flat = nnx.to_flat_state(state)
  return {(*stack.path, *path): variable.get_value() for path, variable in flat}


def _noisy_copy(variable, hottest: jax.Array, key: jax.Array, noise: float) -> jax.Array:
  """Returns the hottest expert's part of every repeat, with noise of its own for each expert."""
  axis, value = expert_axis(variable), variable.get_value()

  def of_repeat(value, hot, key):
    source = jax.lax.dynamic_index_in_dim(value, hot, axis - 1)
    scale = noise * jnp.sqrt(jnp.mean(jnp.square(source)))
    return source + scale * jax.random.normal(key, value.shape)

  return jax.vmap(of_repeat)(value, hottest, jax.random.split(key, value.shape[0]))


def _repair_bias(variable, load: jax.Array, cold: jax.Array, config) -> nnx.Variable:
  """Replaces the bias of cold experts, (repeats, E'): theirs is that of an expert nobody wants.

  A copy competes at the bias of its original, a fresh expert at the mean of the warm ones.
  """
  bias = variable.get_value()
  if config.repair.init == RepairInit.COPY:
    new = jnp.take_along_axis(bias, jnp.argmax(load, -1, keepdims=True), axis=-1)
  else:
    warm = bias[:, : cold.shape[1]]
    new = jnp.mean(warm, axis=-1, keepdims=True, where=~cold)
  return variable.replace(jnp.where(over_experts(cold, variable), new, bias))


def _select(mask: nnx.Variable, new: jax.Array, old: nnx.Variable) -> nnx.Variable:
  return old.replace(jnp.where(mask.get_value(), new, old.get_value()))


def _forget(opt_state, optimizer: optax.GradientTransformation, reset: nnx.State):
  """Sets to zero whatever the optimiser keeps for the entries marked in `reset`."""

  def zero(kept, mask):
    value = kept.get_value()
    return kept.replace(jnp.where(along(mask, kept), jnp.zeros_like(value), value))

  return map_optimizer(optimizer, zero, opt_state, reset)
