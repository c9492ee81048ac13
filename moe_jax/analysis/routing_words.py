"""A routing config in words: what each field decides, whether it is read, and stage summaries."""

import dataclasses
import enum

from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import (
  BalanceFraction,
  BalanceSource,
  BiasUpdate,
  CapacityConvention,
  Grouping,
  Noise,
  Overflow,
  Priority,
  Projection,
  Rounding,
  Weighting,
  WeightOn,
)
from moe_jax.moe.registry import Chooser

UNUSED = "unused"

# What each field decides; every field of `RoutingConfig` has an entry.
MEANINGS = {
  "num_experts": "experts",
  "top_k": "experts asked for by each token",
  "num_null_experts": "experts without parameters",
  "null_expert": "what an expert without parameters returns",
  "projection": "how the router makes logits of activations",
  "score": "logits to scores",
  "noise": "what training adds to the logits",
  "noise_std": "standard deviation of that noise",
  "granularity": "what is routed as one",
  "selection": "how experts are selected",
  "second_threshold": "share of both scores above which the second expert is used",
  "num_expert_groups": "groups of experts",
  "top_expert_groups": "groups of experts open to a token",
  "group_score": "score of a group of experts",
  "hash_seed": "seed of the hash, table or fixed choice",
  "hash_ngram": "tokens hashed together",
  "sinkhorn_iterations": "iterations of the balancing",
  "sparsemixer_epsilon": "half of the relative gap that puts an expert out of reach",
  "bias_update": "how a selection bias follows the load",
  "bias_rate": "speed of that bias",
  "weighting": "scores to combine weights",
  "weight_norm_order": "order of the norm that weights are divided by",
  "weight_scale": "factor of the weights",
  "weight_on": "where the weight is applied",
  "capacity_convention": "what a capacity factor counts",
  "capacity_factor": "capacity factor in training",
  "eval_capacity_factor": "capacity factor outside training",
  "capacity": "slots of an expert, given",
  "capacity_rounding": "rounding of the slots",
  "min_capacity": "least slots of an expert",
  "capacity_multiple": "slots are raised to a multiple of",
  "overflow": "when an expert is full",
  "reroute_attempts": "times a dropped assignment asks again",
  "drop_order": "which assignments ask first",
  "priority": "which tokens ask first",
  "grouping": "which tokens compete for slots",
  "group_size": "tokens of a group",
  "balance_fraction": "what the load f of the balance loss counts",
  "balance_source": "whether f counts before or after drops",
  "balance_scope": "over what f and P are averaged",
  "importance": "what the importance loss sums",
  "load_threshold": "threshold of the load loss",
  "loss_padding": "how padding enters the losses",
  "balance_loss_weight": "coefficient of the balance loss",
  "z_loss_weight": "coefficient of the router z-loss",
  "importance_loss_weight": "coefficient of the importance loss",
  "load_loss_weight": "coefficient of the load loss",
  "device_loss_weight": "coefficient of the balance loss over expert groups",
  "communication_loss_weight": "coefficient of the communication loss over expert groups",
  "adaptive_target": "what the balance loss's coefficient adapts to",
  "adaptive_factor": "factor by which it adapts",
}


def shown_fields(config: RoutingConfig) -> dict[str, tuple[str, str]]:
  """Returns (meaning, value) of every field; the value is "unused" where the router ignores it."""
  unread = _unread(config)
  shown = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    text = str(value.value if isinstance(value, enum.Enum) else value)
    shown[field.name] = MEANINGS[field.name], UNUSED if field.name in unread else text
  return shown


def _unread(config: RoutingConfig) -> set[str]:
  """Returns the fields that this router never reads, given its other fields."""
  token_choice = config.selector.chooser == Chooser.TOKEN
  drops = token_choice and config.overflow != Overflow.DROPLESS
  slots = drops or not token_choice
  normed = (Weighting.RENORMALIZED, Weighting.RENORMALIZED_AFTER_DROP)
  factors = {"capacity_factor", "eval_capacity_factor", "capacity_convention"}
  factors |= {"capacity_rounding", "min_capacity", "capacity_multiple"}
  read_only_if = [
    (config.num_null_experts, {"null_expert"}),
    (config.noise not in (Noise.NONE, Noise.LEARNED), {"noise_std"}),
    (config.selection in ("random_second", "threshold_second"), {"second_threshold"}),
    (config.num_expert_groups > 1, {"group_score", "top_expert_groups"}),
    (config.selection == "hash", {"hash_ngram"}),
    # "random" outside training.
    (config.selection in ("hash", "table", "random"), {"hash_seed"}),
    (config.selection == "sinkhorn", {"sinkhorn_iterations"}),
    (config.selection == "sparsemixer", {"sparsemixer_epsilon"}),
    (config.bias_update != BiasUpdate.NONE, {"bias_rate"}),
    (config.weighting in normed, {"weight_norm_order"}),
    (slots and config.capacity is None, factors),
    (slots, {"capacity"}),
    # Selections that do not rank a token's experts may look at the whole group.
    (slots or not config.selector.ranked, {"grouping", "group_size"}),
    (drops, {"drop_order", "priority"}),
    (config.top_k > 1, {"drop_order"}),
    (config.overflow == Overflow.REROUTE, {"reroute_attempts"}),
    (token_choice, {"overflow"}),
    (config.grouping == Grouping.FIXED, {"group_size"}),
    (config.balance_loss_weight or config.device_loss_weight, {"balance_fraction"}),
    (_balances(config), {"balance_source", "balance_scope"}),
    (config.importance_loss_weight, {"importance"}),
    (config.load_loss_weight, {"load_threshold"}),
    (config.adaptive_target is not None, {"adaptive_factor"}),
  ]
  unread = set().union(*(fields for read, fields in read_only_if if not read))
  if _loss_scope_reads_groups(config):
    unread -= {"grouping"} | ({"group_size"} if config.grouping == Grouping.FIXED else set())
  return unread


def _loss_scope_reads_groups(config):
  return config.balance_scope == "group" and bool(
    _balances(config) or config.importance_loss_weight or config.load_loss_weight
  )


def _balances(config):
  return config.balance_loss_weight or config.device_loss_weight or config.communication_loss_weight


def score_words(config: RoutingConfig) -> str:
  """Describes the score stage."""
  noise = "" if config.noise == Noise.NONE else f" + {config.noise} noise"
  if config.noise not in (Noise.NONE, Noise.LEARNED):
    noise += f" ({config.noise_std:.3g})"
  projection = "" if config.projection == Projection.LINEAR else f"{config.projection} logits, "
  return f"{projection}{config.score}{noise}"


def selection_words(config: RoutingConfig) -> str:
  """Describes the select stage."""
  words = [f"{config.selection} {config.top_k} of {config.num_experts}"]
  if config.num_expert_groups > 1:
    words.append(
      f"in {config.top_expert_groups} of {config.num_expert_groups} groups by {config.group_score}"
    )
  if config.selection in ("random_second", "threshold_second"):
    words.append(f"threshold {config.second_threshold:g}")
  if config.bias_update != BiasUpdate.NONE:
    words.append(f"{config.bias_update} bias {config.bias_rate:g}")
  return ", ".join(words)


def weight_words(config: RoutingConfig) -> str:
  """Describes the weigh stage."""
  words = str(config.weighting).replace("_", " ")
  if config.weighting == Weighting.RENORMALIZED:
    words += " before drop"
  if config.weight_scale != 1.0:
    words += f" x {config.weight_scale:g}"
  return words + (", on input" if config.weight_on == WeightOn.INPUT else "")


def capacity_words(config: RoutingConfig) -> str:
  """Describes the slots of an expert as a formula of S (tokens of a group), E and K."""
  if config.capacity is not None:
    return str(config.capacity)
  if config.selector.chooser == Chooser.TOKEN and config.overflow == Overflow.DROPLESS:
    return "S"
  k = "" if config.capacity_convention == CapacityConvention.PER_TOKEN else "K "
  formula = _ROUNDINGS[config.capacity_rounding].format(k=k)
  if config.min_capacity > 1:
    formula = f"max({formula}, {config.min_capacity})"
  if config.capacity_multiple > 1:
    formula += f" to multiple of {config.capacity_multiple}"
  train, evaluation = config.capacity_factor, config.eval_capacity_factor
  factors = f"{train:g}" if train == evaluation else f"{train:g}, eval {evaluation:g}"
  return f"{formula}; f = {factors}"


_ROUNDINGS = {
  Rounding.CEIL: "ceil(f {k}S/E)",
  Rounding.FLOOR: "floor(f {k}S/E)",
  Rounding.ROUND_HALF_EVEN: "round(f {k}S/E)",
  Rounding.FLOOR_OF_CEILED_ASSIGNMENTS: "floor(f ceil({k}S/E))",
  Rounding.FLOOR_OF_CEILED_TOKENS: "{k}floor(f ceil(S/E))",
}


_BY_ASSIGNMENT = (Priority.PROBABILITY, Priority.WEIGHT)


def overflow_words(config: RoutingConfig) -> str:
  """Describes the place stage: what happens at a full expert, and who asks first."""
  if config.selector.chooser != Chooser.TOKEN:
    return "cannot overflow"
  if config.overflow == Overflow.DROPLESS:
    return "dropless"
  words = [str(config.overflow)]
  if config.top_k > 1 and config.priority not in _BY_ASSIGNMENT:
    words.append(str(config.drop_order).replace("_", "-"))
  return ", ".join([*words, f"by {str(config.priority).replace('_', ' ')}"])


def group_words(config: RoutingConfig) -> str:
  """Describes which tokens form a routing group."""
  fixed = config.grouping == Grouping.FIXED
  return f"{config.group_size} tokens" if fixed else str(config.grouping)


def loss_words(config: RoutingConfig) -> str:
  """Describes the router losses with their coefficients."""
  words = []
  if config.balance_loss_weight:
    words.append(_balance_words(config))
  if config.device_loss_weight:
    words.append(f"{config.device_loss_weight:g} over devices")
  if config.communication_loss_weight:
    words.append(f"{config.communication_loss_weight:g} communication")
  if config.z_loss_weight:
    words.append(f"{config.z_loss_weight:g} z")
  if config.importance_loss_weight:
    words.append(f"{config.importance_loss_weight:g} importance of {config.importance}")
  if config.load_loss_weight:
    words.append(f"{config.load_loss_weight:g} load, {config.load_threshold}".replace("_", " "))
  if config.loss_padding != "exclude":
    words.append(f"padding as {config.loss_padding}")
  return "; ".join(words) or "none"


def _balance_words(config):
  counted = {
    BalanceFraction.FIRST_CHOICE: "first choices",
    BalanceFraction.ALL_CHOICES: "all choices",
    BalanceFraction.ALL_CHOICES_MEAN: "all choices / K",
  }[config.balance_fraction]
  kept = " kept" if config.balance_source == BalanceSource.DISPATCH else ""
  scope = str(config.balance_scope).replace("_", " ")
  adapts = "" if config.adaptive_target is None else " adaptive"
  return f"{config.balance_loss_weight:g}{adapts} {counted}{kept} per {scope}"
