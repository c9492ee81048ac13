"""Named routers of papers, as values of the stages. An ablation changes one field of a preset."""

import dataclasses

from moe_jax.choices import did_you_mean
from moe_jax.errors import UserError
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import (
  BalanceFraction,
  BalanceScope,
  CapacityConvention,
  Grouping,
  Overflow,
  Rounding,
  Weighting,
)

_PRESETS: dict[str, dict] = {
  # Switch Transformer, arXiv 2101.03961: top-1 weighted by its probability (Eq. 2), capacity
  # tokens / experts * factor (Eq. 3), loss Eq. 4 with alpha = 0.01. The paper gives no rounding
  # and no evaluation factor; Mesh TensorFlow, where it was trained, floors and takes 1.25 and 2.0
  # (tensorflow/mesh, mesh_tensorflow/transformer/moe.py).
  "switch": dict(
    num_experts=8,
    top_k=1,
    weighting=Weighting.RAW,
    capacity_convention=CapacityConvention.PER_TOKEN,
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
    capacity_rounding=Rounding.FLOOR,
    balance_fraction=BalanceFraction.FIRST_CHOICE,
    balance_scope=BalanceScope.GROUP,
    balance_loss_weight=0.01,
  ),
  # GShard, arXiv 2006.16668 Algorithm 1: top-2 in local groups, weights normalised before drops,
  # second expert at random, capacity 2S/E, auxiliary loss of first choices per group.
  "gshard": dict(
    num_experts=8,
    top_k=2,
    selection="random_second",
    weighting=Weighting.RENORMALIZED,
    capacity_convention=CapacityConvention.PER_ASSIGNMENT,
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    grouping=Grouping.SEQUENCE,
    balance_fraction=BalanceFraction.FIRST_CHOICE,
    balance_scope=BalanceScope.GROUP,
    balance_loss_weight=0.01,
  ),
  # GLaM, arXiv 2112.06905: GShard's gating with the second expert always used; capacity factor 2
  # counts slots per token.
  "glam": dict(
    num_experts=64,
    top_k=2,
    weighting=Weighting.RENORMALIZED,
    capacity_convention=CapacityConvention.PER_TOKEN,
    capacity_factor=2.0,
    eval_capacity_factor=2.0,
    capacity_rounding=Rounding.FLOOR,
    grouping=Grouping.SEQUENCE,
    balance_fraction=BalanceFraction.FIRST_CHOICE,
    balance_scope=BalanceScope.GROUP,
    balance_loss_weight=0.01,
  ),
  # Mixtral, arXiv 2401.04088 section 2.1: softmax over the two selected logits, no token dropped;
  # the auxiliary loss counts both choices over all tokens. The released code takes one loss over
  # the tokens of all layers times 0.02; ours adds up layers (`ModelAux.weighted_loss`), so divide
  # the coefficient by their number for the released strength.
  "mixtral": dict(
    num_experts=8,
    top_k=2,
    weighting=Weighting.SOFTMAX_SELECTED,
    overflow=Overflow.DROPLESS,
    balance_fraction=BalanceFraction.ALL_CHOICES,
    balance_scope=BalanceScope.BATCH,
    balance_loss_weight=0.02,
  ),
}


def preset(name: str, **overrides) -> RoutingConfig:
  """Returns the routing config of a paper, with some fields replaced.

  Raises:
    UserError: an unknown preset or field, naming the nearest one.
  """
  if name not in _PRESETS:
    raise UserError(f"router preset {name!r} does not exist; {did_you_mean(name, _PRESETS)}")
  fields = [field.name for field in dataclasses.fields(RoutingConfig)]
  for field in overrides:
    if field not in fields:
      raise UserError(f"routing config has no field {field!r}; {did_you_mean(field, fields)}")
  return RoutingConfig(**{**_PRESETS[name], **overrides})


def register_preset(name: str, **fields) -> None:
  """Enters a preset of one's own; see `register_selection` for a selection of one's own.

  Raises:
    UserError: a name that is taken.
  """
  if name in _PRESETS:
    raise UserError(f"router preset {name!r} exists already; choose another name")
  _PRESETS[name] = fields


def preset_names() -> list[str]:
  """Returns the names of all presets."""
  return sorted(_PRESETS)
