"""Balanced devices in training: experts move between devices as their measured loads ask for.

Every `balance_placement.every` steps the host reads the loads that the steps counted, packs experts
to devices (`moe_jax.moe.placement_change`) and, in the layers where that pays, moves them with all
that the state holds of them and fills spare slots with copies of the hottest. The model computes
what it did; what changes is how long devices wait for each other. They wait where they compute what
they are sent, under `dispatch = ragged`; the other forms compute every slot whatever the loads are.
All of this is a function of the state alone, so a resumed run does the same.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import optax
from absl import logging

from moe_jax.moe.placement_balance import Devices
from moe_jax.moe.placement_change import better_placement
from moe_jax.sharding.layout import Layout
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.expert_moves import move_experts
from moe_jax.training.state import PlacementState, TrainState


def make_balancer(
  config: ExperimentConfig, optimizer: optax.GradientTransformation, layout: Layout | None = None
) -> Callable[[TrainState, int], TrainState]:
  """Returns balance(state, step) -> state, to call after each step; it donates what it moves.

  Raises:
    UserError: a number of devices that is not the layout's, or that experts cannot be packed to.
  """
  every = config.balance_placement.every
  if not every:
    return lambda state, step: state
  parts = 1 if layout is None else layout.parts("expert")
  devices = config.balance_placement.packed_to(parts, config.model.moe)

  def balance(state: TrainState, step: int) -> TrainState:
    # After the last step there is nothing left to balance.
    if step % every or step == config.steps:
      return state
    return _balance(state, config, optimizer, devices)

  return balance


def _balance(state: TrainState, config, optimizer, devices: Devices) -> TrainState:
  options, groups = config.balance_placement, config.model.moe.routing.num_expert_groups
  load, copied = _on_host(state.placement)
  change = better_placement(load, copied, devices, groups=groups, min_gain=options.min_gain)
  logging.info("max/mean load of %d devices: %s -> %s", devices.count, change.before, change.after)
  if (change.order != np.arange(load.shape[1])).any():
    state = move_experts(state, change.order, config.model, optimizer)
  return dataclasses.replace(state, placement=_next_window(state.placement, change.copied))


def _on_host(window: PlacementState) -> tuple[np.ndarray, np.ndarray]:
  """Returns the loads (MoE layers, E) and what is copied (MoE layers, spare)."""
  load = np.asarray(jax.device_get(window.load))
  if window.copied is None:
    return load, np.zeros((len(load), 0), np.int32)
  return load, np.asarray(jax.device_get(window.copied))


def _next_window(window: PlacementState, copied: np.ndarray) -> PlacementState:
  """Returns an empty window, where the old one was."""
  load = jax.device_put(np.zeros(window.load.shape, np.float32), window.load.sharding)
  if window.copied is None:
    return dataclasses.replace(window, load=load)
  return dataclasses.replace(
    window, load=load, copied=jax.device_put(copied, window.copied.sharding)
  )
