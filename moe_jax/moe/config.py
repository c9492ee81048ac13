"""The routing config: one router, as the choice made at each stage. Presets: `presets.py`."""

import dataclasses
import enum
import math
import numbers

from moe_jax.choices import as_choice
from moe_jax.errors import UserError
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
from moe_jax.moe.registry import Chooser, Selector, get_selector


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
  """One router, as the choice made at each stage.

  Attributes:
    num_experts: E, always the global total; null experts come on top.
    top_k: K, experts asked for by each token. With `expert_choice` it sets the mean number of
      experts a token gets (capacity), with `positive` the number that the balance loss aims at.
    num_null_experts, null_expert: experts without parameters, which take no slot; ids from E on.

    projection: activations -> logits, which the layer's router does.
    score: logits -> scores.
    noise, noise_std: what is added to the logits in training.
    granularity: what is routed as one.

    selection: scores -> experts, a name of `moe_jax.moe.registry`.
    second_threshold: GShard's: `threshold_second` uses the second expert when its share of the two
      scores exceeds it, `random_second` with probability min(1, share / second_threshold).
    num_expert_groups, top_expert_groups, group_score: with more than one group a token asks only
      experts of its best groups (device- and node-limited routing). `hierarchical` reads the first
      two as the number of first-level gates and how many of them are taken.
    hash_seed, hash_ngram: the hash of `selection = hash`, of the last hash_ngram token ids of the
      sequence; hash_seed also of the tables of `selection = table`.
    sinkhorn_iterations: of `selection = sinkhorn`.
    sparsemixer_epsilon: of `selection = sparsemixer`: logits more than twice this share below the
      best are out of reach.
    bias_update, bias_rate: the selection bias that balances without a loss.

    weighting, weight_norm_order, weight_scale: scores -> combine weights; the norm that
      `renormalized` divides by (1: the sum), and a factor at the end.
    weight_on: before or after the expert.

    capacity_convention, capacity_factor: the slots of an expert in training.
    eval_capacity_factor: the same outside training.
    capacity: the exact number of slots C per expert and group; overrides both factors.
    capacity_rounding, min_capacity, capacity_multiple: applied to the factor's result in this
      order; C never exceeds S, since a token asks for an expert once.
    overflow, reroute_attempts, drop_order, priority: the place stage.
    grouping, group_size: which tokens form a group; `group_size` belongs to `fixed` alone.

    balance_fraction, balance_source, balance_scope: the load-balance loss.
    importance, load_threshold: what the importance and load losses are computed from.
    loss_padding: how masked tokens enter the losses.
    balance_loss_weight, z_loss_weight, importance_loss_weight, load_loss_weight,
    device_loss_weight, communication_loss_weight: the coefficients of the losses in
      `moe_jax.moe.losses` and `moe_jax.moe.device_losses`; a device is an expert group.
    adaptive_target, adaptive_factor: when a target is set, the coefficient of the balance loss is
      multiplied by adaptive_factor after a step in which the mean number of experts per token
      (`positive`) or the max violation (all others) exceeds it, and divided below it (ReMoE,
      arXiv 2412.14711 Eq. 9).
  """

  num_experts: int
  top_k: int = 1
  num_null_experts: int = 0
  null_expert: NullExpert = NullExpert.ZERO

  projection: Projection = Projection.LINEAR
  score: Score = Score.SOFTMAX
  noise: Noise = Noise.NONE
  noise_std: float = 1.0
  granularity: Granularity = Granularity.TOKEN

  selection: str = "top_k"
  second_threshold: float = 0.5
  num_expert_groups: int = 1
  top_expert_groups: int = 1
  group_score: GroupScore = GroupScore.MAX
  hash_seed: int = 0
  hash_ngram: int = 1
  sinkhorn_iterations: int = 50
  sparsemixer_epsilon: float = 0.01
  bias_update: BiasUpdate = BiasUpdate.NONE
  bias_rate: float = 0.001

  weighting: Weighting = Weighting.RAW
  weight_norm_order: float = 1.0
  weight_scale: float = 1.0
  weight_on: WeightOn = WeightOn.OUTPUT

  capacity_convention: CapacityConvention = CapacityConvention.PER_ASSIGNMENT
  capacity_factor: float = 1.25
  eval_capacity_factor: float = 2.0
  capacity: int | None = None
  capacity_rounding: Rounding = Rounding.CEIL
  min_capacity: int = 1
  capacity_multiple: int = 1
  overflow: Overflow = Overflow.DROP
  reroute_attempts: int = 1
  drop_order: DropOrder = DropOrder.CHOICE_MAJOR
  priority: Priority = Priority.POSITION
  grouping: Grouping = Grouping.BATCH
  group_size: int | None = None

  balance_fraction: BalanceFraction = BalanceFraction.FIRST_CHOICE
  balance_source: BalanceSource = BalanceSource.SELECTION
  balance_scope: BalanceScope = BalanceScope.GROUP
  importance: Importance = Importance.SCORES
  load_threshold: LoadThreshold = LoadThreshold.EXCLUDE_SELF
  loss_padding: LossPadding = LossPadding.EXCLUDE
  balance_loss_weight: float = 0.01
  z_loss_weight: float = 0.0
  importance_loss_weight: float = 0.0
  load_loss_weight: float = 0.0
  device_loss_weight: float = 0.0
  communication_loss_weight: float = 0.0
  adaptive_target: float | None = None
  adaptive_factor: float = 1.2

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(field.type, enum.EnumType):
        object.__setattr__(self, field.name, as_choice(field.type, field.name, value))
      elif field.type is not str:
        _check_number(field, value)
    _check_ranges(self)
    _check_groups(self)
    _check_selection(self)
    _check_weights(self)
    _check_losses(self)

  @property
  def selector(self) -> Selector:
    """The function of the select stage and its traits."""
    return get_selector(self.selection)

  @property
  def num_logits(self) -> int:
    """Outputs E' of the router: null experts, first-level gates and slots count too."""
    if self.selector.chooser == Chooser.SLOT:
      return self.num_experts * self.capacity
    if self.selection == "hierarchical":
      return self.num_experts + self.num_expert_groups
    return self.num_experts + self.num_null_experts

  @property
  def num_load_fractions(self) -> int:
    """Load fractions that losses of `balance_scope = global_batch` read: of experts, devices."""
    return self.num_experts + (self.num_expert_groups if self.communication_loss_weight else 0)

  @property
  def needs_key(self) -> bool:
    """Whether training draws random numbers."""
    random = self.noise != Noise.NONE or self.priority == Priority.RANDOM
    return random or self.selector.draws

  def check_trainable(self) -> None:
    """Refuses weightings under which the language-model loss cannot reach the router.

    With one choice, a renormalised weight is g / g = 1 whatever the router says: its gradient is
    exactly zero, and only the auxiliary losses would train the router.

    Raises:
      UserError: if the combine weight is constant.
    """
    if not self.selector.learned:
      return
    renormalized = (
      Weighting.RENORMALIZED,
      Weighting.RENORMALIZED_AFTER_DROP,
      Weighting.SOFTMAX_SELECTED,
    )
    if self.top_k == 1 and self.weighting in renormalized and self.selection != "positive":
      raise UserError(
        f"weighting = {self.weighting} with top_k = 1 makes every combine weight 1, so the"
        " language-model loss never trains the router; use weighting = raw, or top_k >= 2"
        " (loading and inference accept it)"
      )
    if self.weighting == Weighting.HARD:
      raise UserError(
        "weighting = hard gives every combine weight 1 without a gradient, so the language-model"
        " loss never trains the router; use weighting = straight_through"
        " (loading and inference accept it)"
      )


def _check_ranges(config: RoutingConfig) -> None:
  at_least_1 = ("num_experts", "min_capacity", "capacity_multiple", "num_expert_groups")
  at_least_1 += ("top_expert_groups", "hash_ngram", "sinkhorn_iterations", "reroute_attempts")
  for name in at_least_1:
    _require(config, name, getattr(config, name) >= 1, "at least 1")
  _require(config, "num_null_experts", config.num_null_experts >= 0, "0 or greater")
  _require(config, "hash_seed", 0 <= config.hash_seed < 2**32, "in [0, 2^32)")
  finite = ("balance_loss_weight", "z_loss_weight", "importance_loss_weight", "load_loss_weight")
  finite += ("device_loss_weight", "communication_loss_weight", "bias_rate", "second_threshold")
  for name in finite:
    _require(config, name, 0 <= getattr(config, name) < math.inf, "0 or greater and finite")
  for name in ("capacity_factor", "eval_capacity_factor"):
    finite = "greater than 0 and finite (overflow = dropless drops nothing)"
    _require(config, name, 0 < getattr(config, name) < math.inf, finite)
  for name in ("noise_std", "weight_norm_order", "weight_scale", "sparsemixer_epsilon"):
    _require(config, name, 0 < getattr(config, name) < math.inf, "greater than 0 and finite")
  experts = config.num_experts + config.num_null_experts
  bound = f"between 1 and num_experts = {config.num_experts}"
  if config.num_null_experts:
    bound = f"between 1 and num_experts + num_null_experts = {experts}"
  _require(config, "top_k", 1 <= config.top_k <= experts, bound)
  wanted = "at least 1, or None to use the capacity factor"
  _require(config, "capacity", config.capacity is None or config.capacity >= 1, wanted)
  factor, target = config.adaptive_factor, config.adaptive_target
  _require(config, "adaptive_factor", 1 < factor < math.inf, "greater than 1 and finite")
  _require(config, "adaptive_target", target is None or target > 0, "greater than 0, or None")


def _check_groups(config: RoutingConfig) -> None:
  if config.grouping == Grouping.FIXED:
    holds = config.group_size is not None and config.group_size >= 1
    _require(config, "group_size", holds, "at least 1 with grouping = fixed")
  else:
    wanted = f"None with grouping = {config.grouping}; set grouping = fixed to use it"
    _require(config, "group_size", config.group_size is None, wanted)
  groups = config.num_expert_groups
  holds = config.num_experts % groups == 0
  _require(config, "num_expert_groups", holds, f"a divisor of num_experts = {config.num_experts}")
  wanted = f"between 1 and num_expert_groups = {groups}"
  _require(config, "top_expert_groups", config.top_expert_groups <= groups, wanted)
  if groups == 1:
    return
  size = config.num_experts // groups
  reach = config.top_expert_groups * size
  wanted = f"at most {reach}, the experts in {config.top_expert_groups} groups of {size}"
  _require(config, "top_k", config.top_k <= reach, wanted)
  _require(config, "num_null_experts", not config.num_null_experts, "0 with num_expert_groups > 1")
  if config.group_score == GroupScore.TOP2_SUM:
    wanted = "max with a single expert per group"
    _require(config, "group_score", size >= 2, wanted)


def _check_selection(config: RoutingConfig) -> None:
  selector, name = config.selector, f"selection = {config.selection}"
  if not selector.ranked and config.selection != "hierarchical":
    wanted = f"1 with {name}, which does not rank experts"
    _require(config, "num_expert_groups", config.num_expert_groups == 1, wanted)
  if not selector.ranked:
    wanted = f"none with {name}, which does not rank experts"
    _require(config, "bias_update", config.bias_update == BiasUpdate.NONE, wanted)
    wanted = f"drop or dropless with {name}, which knows no next best expert"
    _require(config, "overflow", config.overflow != Overflow.REROUTE, wanted)
    wanted = f"0 with {name}, which does not rank experts"
    _require(config, "num_null_experts", not config.num_null_experts, wanted)
  if config.bias_update == BiasUpdate.QUANTILE:
    plain = config.num_expert_groups == 1 and config.top_k < config.num_logits
    wanted = "sign or magnitude with num_expert_groups > 1 or with every expert selected"
    _require(config, "bias_update", plain, wanted)
  if config.num_null_experts:
    wanted = "drop or dropless with null experts, which never overflow"
    _require(config, "overflow", config.overflow != Overflow.REROUTE, wanted)
  if selector.chooser != Chooser.TOKEN:
    wanted = f"drop with {name}, where nothing overflows"
    _require(config, "overflow", config.overflow == Overflow.DROP, wanted)
    wanted = f"position with {name}, where no token waits for a slot"
    _require(config, "priority", config.priority == Priority.POSITION, wanted)
    wanted = f"token with {name}"
    _require(config, "granularity", config.granularity == Granularity.TOKEN, wanted)
  if selector.chooser == Chooser.SLOT:
    wanted = f"the number of slots per expert with {name}"
    _require(config, "capacity", config.capacity is not None, wanted)
    wanted = f"softmax with {name}"
    _require(config, "score", config.score == Score.SOFTMAX, wanted)
    wanted = f"output with {name}"
    _require(config, "weight_on", config.weight_on == WeightOn.OUTPUT, wanted)
  if config.selection in ("random_second", "threshold_second"):
    _require(config, "top_k", config.top_k == 2, f"2 with {name}")
  if config.selection in ("sinkhorn", "base"):
    _require(config, "top_k", config.top_k == 1, f"1 with {name}")
  if config.selection == "hierarchical":
    _check_hierarchical(config)


def _check_hierarchical(config: RoutingConfig) -> None:
  gates, size = config.top_expert_groups, config.num_experts // config.num_expert_groups
  holds = config.top_k % gates == 0 and config.top_k // gates <= size
  wanted = f"a multiple of top_expert_groups = {gates} up to {gates * size}"
  _require(config, "top_k", holds, wanted + " with selection = hierarchical")
  wanted = "softmax with selection = hierarchical"
  _require(config, "score", config.score == Score.SOFTMAX, wanted)


def _check_weights(config: RoutingConfig) -> None:
  chooser = config.selector.chooser
  if chooser != Chooser.TOKEN:
    fits = (Weighting.RAW,)
    if chooser == Chooser.EXPERT:
      fits = (Weighting.RAW, Weighting.HARD, Weighting.STRAIGHT_THROUGH)
    wanted = f"{' or '.join(fits)} with selection = {config.selection}"
    _require(config, "weighting", config.weighting in fits, wanted)
  own = config.selection == "sparsemixer"
  wanted = "sparsemixer with selection = sparsemixer, which makes its own weights"
  if not own:
    wanted = "another one, or selection = sparsemixer, which makes these weights"
  _require(config, "weighting", own == (config.weighting == Weighting.SPARSEMIXER), wanted)


def _check_losses(config: RoutingConfig) -> None:
  if config.load_loss_weight:
    wanted = "0 without gaussian or learned noise, whose distribution the load loss integrates"
    noisy = config.noise in (Noise.GAUSSIAN, Noise.LEARNED)
    _require(config, "load_loss_weight", noisy, wanted)
    wanted = "0 with num_null_experts > 0 or a selection that is not top_k"
    plain = config.selection == "top_k" and not config.num_null_experts
    _require(config, "load_loss_weight", plain, wanted)
    # The K-th largest noisy logit is no threshold where something else ranks or limits experts.
    wanted = "0 with bias_update other than none or top_expert_groups < num_expert_groups"
    limited = config.top_expert_groups < config.num_expert_groups
    plain = config.bias_update == BiasUpdate.NONE and not limited
    _require(config, "load_loss_weight", plain, wanted)
  for name in ("device_loss_weight", "communication_loss_weight"):
    wanted = "0 with num_expert_groups = 1: the devices of these losses are expert groups"
    _require(config, name, not getattr(config, name) or config.num_expert_groups > 1, wanted)
  if config.selector.chooser == Chooser.SLOT:
    for name in ("balance_loss_weight", "importance_loss_weight"):
      wanted = f"0 with selection = {config.selection}: every slot is used by design"
      _require(config, name, getattr(config, name) == 0, wanted)


def _check_number(field: dataclasses.Field, value: object) -> None:
  """Refuses what is no number, and a fraction where a count is meant."""
  if value is None and field.type in (int | None, float | None):
    return
  is_count = field.type in (int, int | None)
  kind, words = (numbers.Integral, "an integer") if is_count else (numbers.Real, "a number")
  # A bool is an int to Python, never to the user.
  if not isinstance(value, kind) or isinstance(value, bool):
    raise UserError(f"{field.name} = {value!r} is refused: it must be {words}")


def _require(config: RoutingConfig, name: str, holds: bool, expected: str) -> None:
  if not holds:
    raise UserError(f"{name} = {getattr(config, name)} is refused: it must be {expected}")
