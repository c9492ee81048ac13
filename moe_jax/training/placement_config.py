"""The config section `balance_placement`."""

import dataclasses

import numpy as np

from moe_jax.config.bounds import at_least, below
from moe_jax.errors import UserError
from moe_jax.moe import Dispatch, MoEConfig
from moe_jax.moe.expert_permutation import check_movable
from moe_jax.moe.placement_balance import Devices, place_by_moving, place_with_replicas


@dataclasses.dataclass(frozen=True)
class BalancePlacementConfig:
  """Periodic moves of experts to devices, see `moe_jax.training.placement_balance`.

  Attributes:
    every: optimiser steps between moves, and the window over which loads are counted; 0 = never.
    devices: how many devices share the experts of a layer; 0 = the parts that the layout splits
      experts into.
    nodes: in how many nodes; matters where an expert group spans devices.
    spare: slots for copies of hot experts, over all devices together; `dispatch = ragged` alone.
      A step fetches the weights of copies where it uses them, see `moe_jax.moe.replicas`.
    min_gain: a layer's experts move if that lowers the largest load of a device by this share.
  """

  every: int = 0
  devices: int = 0
  nodes: int = 1
  spare: int = 0
  min_gain: float = 0.05

  def __post_init__(self):
    at_least(self, 0, "every", "devices", "spare", "min_gain")
    at_least(self, 1, "nodes")
    below(self, 1, "min_gain")

  def check(self, moe: MoEConfig) -> None:
    """Refuses layers whose experts cannot be moved, or copies that would only add to their work.

    Raises:
      UserError: see above, and `check_movable`.
    """
    check_movable(moe.routing)
    if self.spare and moe.dispatch != Dispatch.RAGGED:
      raise UserError(
        f"balance_placement.spare = {self.spare} is refused with dispatch = {moe.dispatch}, under"
        " which an expert computes all its slots whatever its load, and a copy as many again; use"
        " dispatch = ragged, or spare = 0"
      )

  def packed_to(self, parts: int, moe: MoEConfig) -> Devices:
    """Returns the devices that experts are packed to where the layout splits them into `parts`.

    Raises:
      UserError: another number than that, none, or one that the experts cannot be packed to.
    """
    if parts > 1 and self.devices not in (0, parts):
      raise UserError(
        f"balance_placement.devices = {self.devices} is refused: the layout splits experts into"
        f" {parts} parts; use 0, which takes that number"
      )
    if parts == 1 and self.devices == 0:
      raise UserError(
        "balance_placement.devices = 0 is refused: the layout does not split experts, so there is"
        " no number of devices to take; give one, or balance_placement.every = 0"
      )
    devices, groups = Devices(self.devices or parts, self.nodes), moe.routing.num_expert_groups
    even = np.ones((1, moe.routing.num_experts), np.float32)
    place_by_moving(even, devices, groups=groups)
    place_with_replicas(even, devices, spare=self.spare, groups=groups)
    return devices
