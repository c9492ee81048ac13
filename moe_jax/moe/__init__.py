"""Mixture-of-Experts: the pure routing core and the modules that carry its parameters."""

# The next four enter their functions into the registry of selections.
from moe_jax.moe import assignment, selection, soft, sparsemixer  # noqa: F401
from moe_jax.moe.capacity import expert_capacity
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.dispatch import Dispatch, get_dispatcher
from moe_jax.moe.layer import MoEAux, MoEConfig, MoELayer, RouterInputs, SharedCombine
from moe_jax.moe.options import (
  BalanceFraction,
  BalanceScope,
  BalanceSource,
  BiasUpdate,
  CapacityConvention,
  DropOrder,
  Granularity,
  Grouping,
  GroupScore,
  Importance,
  LoadThreshold,
  LossPadding,
  Noise,
  NullExpert,
  Overflow,
  Priority,
  Projection,
  Rounding,
  Score,
  Weighting,
  WeightOn,
)
from moe_jax.moe.plan import DensePlan, RoutingPlan
from moe_jax.moe.presets import preset, preset_names, register_preset
from moe_jax.moe.registry import (
  ExpertChoice,
  SelectView,
  TokenChoice,
  register_selection,
  selection_names,
)
from moe_jax.moe.routing import route

__all__ = [
  "BalanceFraction",
  "BalanceScope",
  "BalanceSource",
  "BiasUpdate",
  "CapacityConvention",
  "DensePlan",
  "Dispatch",
  "DropOrder",
  "ExpertChoice",
  "Granularity",
  "GroupScore",
  "Grouping",
  "Importance",
  "LoadThreshold",
  "LossPadding",
  "MoEAux",
  "MoEConfig",
  "MoELayer",
  "Noise",
  "NullExpert",
  "Overflow",
  "Priority",
  "Projection",
  "Rounding",
  "RouterInputs",
  "RoutingConfig",
  "RoutingPlan",
  "Score",
  "SelectView",
  "SharedCombine",
  "TokenChoice",
  "WeightOn",
  "Weighting",
  "expert_capacity",
  "get_dispatcher",
  "preset",
  "preset_names",
  "register_preset",
  "register_selection",
  "route",
  "selection_names",
]
