"""Mixture-of-Experts: the pure routing core and the modules that carry its parameters."""

from moe_jax.moe.capacity import expert_capacity
from moe_jax.moe.dispatch import Dispatch, get_dispatcher
from moe_jax.moe.layer import MoEAux, MoEConfig, MoELayer
from moe_jax.moe.presets import preset, preset_names
from moe_jax.moe.routing import route
from moe_jax.moe.types import (
  BalanceFraction,
  BalanceScope,
  CapacityConvention,
  DropOrder,
  Grouping,
  LossPadding,
  Overflow,
  Priority,
  Rounding,
  RoutingConfig,
  RoutingPlan,
  Selection,
  Weighting,
)

__all__ = [
  "BalanceFraction",
  "BalanceScope",
  "CapacityConvention",
  "Dispatch",
  "DropOrder",
  "Grouping",
  "LossPadding",
  "MoEAux",
  "MoEConfig",
  "MoELayer",
  "Overflow",
  "Priority",
  "Rounding",
  "RoutingConfig",
  "RoutingPlan",
  "Selection",
  "Weighting",
  "expert_capacity",
  "get_dispatcher",
  "preset",
  "preset_names",
  "route",
]
