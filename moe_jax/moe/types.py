"""The vocabulary of the router: axis letters, named choices, the routing config, the plan.

Axis letters, used in names, docstrings and einsum strings throughout the package:

  B batch               L length              G routing groups     S tokens per group
  E experts (global)    K choices per token   C capacity: slots per expert per group
  D model width         F expert hidden       H heads              V vocabulary
  N assignments (token, expert) in the plan of one group
"""

import dataclasses
import enum
import functools
import math
import numbers

import jax
import jax.numpy as jnp

from moe_jax.choices import as_choice
from moe_jax.errors import UserError


class Selection(enum.StrEnum):
  """Select stage: which experts a token asks for."""

  TOP_K = "top_k"  # the K largest scores; ties go to the lower expert id
  RANDOM_SECOND = "random_second"  # top-2, the second used with probability min(1, 2 g2) (GShard)


class Weighting(enum.StrEnum):
  """Weigh stage: scores of the selected experts -> combine weights."""

  RAW = "raw"  # the score itself (Switch, arXiv 2101.03961 Eq. 2)
  RENORMALIZED = "renormalized"  # divided by their sum over the K choices, before any drop
  RENORMALIZED_AFTER_DROP = "renormalized_after_drop"  # divided by the sum over what got a slot
  SOFTMAX_SELECTED = "softmax_selected"  # softmax over the K selected logits (Mixtral)


class CapacityConvention(enum.StrEnum):
  """What a capacity factor CF counts; the literature has both."""

  PER_TOKEN = "per_token"  # slots = CF * S / E, whatever K is (Switch, GLaM, flaxformer)
  PER_ASSIGNMENT = "per_assignment"  # slots = CF * K * S / E (GShard, V-MoE, Megatron)


class Rounding(enum.StrEnum):
  """How a fractional number of slots becomes an integer."""

  CEIL = "ceil"
  FLOOR = "floor"
  ROUND_HALF_EVEN = "round_half_even"  # Python's round()


class Overflow(enum.StrEnum):
  """Place stage: what happens to an assignment whose expert is full."""

  DROP = "drop"  # it is dropped; the token keeps its other experts and the residual
  DROPLESS = "dropless"  # never happens: an expert takes all that ask for it


class DropOrder(enum.StrEnum):
  """Place stage: which assignments ask first.

  With K >= 2 and drops, choice-major is not causal: a later token's first choice can take the slot
  of an earlier token's second.
  """

  CHOICE_MAJOR = "choice_major"  # every first choice before any second choice
  TOKEN_MAJOR = "token_major"  # all choices of a token before the next token's


class Priority(enum.StrEnum):
  """Place stage: which tokens ask first."""

  POSITION = "position"  # in the order of the sequence
  MAX_SCORE = (
    "max_score"  # by largest score (batch prioritised routing, arXiv 2106.05974); not causal
  )


class Grouping(enum.StrEnum):
  """Which tokens compete for the same slots."""

  BATCH = "batch"  # all tokens of the call
  SEQUENCE = "sequence"  # the tokens of one sequence
  FIXED = "fixed"  # group_size consecutive tokens, the last group padded with masked tokens


class BalanceFraction(enum.StrEnum):
  """Which assignments the load fraction f of the balance loss counts (always before any drop)."""

  FIRST_CHOICE = "first_choice"  # sums to 1: the loss is 1 at uniform routing
  ALL_CHOICES = "all_choices"  # sums to K: the loss is K at uniform routing
  ALL_CHOICES_MEAN = "all_choices_mean"  # divided by K: the loss is 1 at uniform routing


class BalanceScope(enum.StrEnum):
  """Over which tokens f and P of the balance loss are averaged before they are multiplied."""

  GROUP = "group"  # per routing group, then the mean over groups
  BATCH = "batch"  # all tokens of the call at once


class LossPadding(enum.StrEnum):
  """How padding enters the router losses."""

  EXCLUDE = "exclude"  # not at all
  FLAXFORMER = "flaxformer"  # that library's: zeroed, but counted in every denominator


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
  """One router, as the choice made at each stage. Presets: `moe_jax.moe.preset`.

  Attributes:
    num_experts: E, always the global total.
    top_k: K, experts asked for by each token.
    selection, weighting: the select and weigh stages.
    capacity_convention, capacity_factor: the slots of an expert in training.
    eval_capacity_factor: the same outside training.
    capacity: the exact number of slots C per expert and group; overrides both factors.
    capacity_rounding, min_capacity, capacity_multiple: applied to the factor's result in this
      order; C never exceeds S, since a token asks for an expert once.
    overflow, drop_order, priority: the place stage.
    grouping, group_size: which tokens form a group; `group_size` belongs to `fixed` alone.
    balance_fraction, balance_scope: the load-balance loss; `balance_loss_weight` its coefficient.
    z_loss_weight: the coefficient of the router z-loss (ST-MoE, arXiv 2202.08906 Eq. 5).
    loss_padding: how masked tokens enter the two losses.
  """

  num_experts: int
  top_k: int = 1
  selection: Selection = Selection.TOP_K
  weighting: Weighting = Weighting.RAW
  capacity_convention: CapacityConvention = CapacityConvention.PER_ASSIGNMENT
  capacity_factor: float = 1.25
  eval_capacity_factor: float = 2.0
  capacity: int | None = None
  capacity_rounding: Rounding = Rounding.CEIL
  min_capacity: int = 1
  capacity_multiple: int = 1
  overflow: Overflow = Overflow.DROP
  drop_order: DropOrder = DropOrder.CHOICE_MAJOR
  priority: Priority = Priority.POSITION
  grouping: Grouping = Grouping.BATCH
  group_size: int | None = None
  balance_fraction: BalanceFraction = BalanceFraction.FIRST_CHOICE
  balance_scope: BalanceScope = BalanceScope.GROUP
  balance_loss_weight: float = 0.01
  z_loss_weight: float = 0.0
  loss_padding: LossPadding = LossPadding.EXCLUDE

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if isinstance(field.type, enum.EnumType):
        value = as_choice(field.type, field.name, getattr(self, field.name))
        object.__setattr__(self, field.name, value)
      else:
        _check_number(field, getattr(self, field.name))
    for name in ("num_experts", "min_capacity", "capacity_multiple"):
      _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
    _require(
      1 <= self.top_k <= self.num_experts,
      "top_k",
      self.top_k,
      f"between 1 and num_experts = {self.num_experts}",
    )
    for name in ("capacity_factor", "eval_capacity_factor"):
      _require(
        0 < getattr(self, name) < math.inf,
        name,
        getattr(self, name),
        "greater than 0 and finite (overflow = dropless drops nothing)",
      )
    for name in ("balance_loss_weight", "z_loss_weight"):
      _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or greater")
    _require(
      self.capacity is None or self.capacity >= 1,
      "capacity",
      self.capacity,
      "at least 1, or None to use the capacity factor",
    )
    if self.selection == Selection.RANDOM_SECOND:
      _require(self.top_k == 2, "top_k", self.top_k, "2 with selection = random_second")
    if self.grouping == Grouping.FIXED:
      _require(
        self.group_size is not None and self.group_size >= 1,
        "group_size",
        self.group_size,
        "at least 1 with grouping = fixed",
      )
    else:
      _require(
        self.group_size is None,
        "group_size",
        self.group_size,
        f"None with grouping = {self.grouping}; set grouping = fixed to use it",
      )

  def check_trainable(self) -> None:
    """Refuses weightings under which the language-model loss cannot reach the router.

    With one choice, a renormalised weight is g / g = 1 whatever the router says: its gradient is
    exactly zero, and only the auxiliary losses would train the router.

    Raises:
      UserError: if the combine weight is constant.
    """
    if self.top_k == 1 and self.weighting != Weighting.RAW:
      raise UserError(
        f"weighting = {self.weighting} with top_k = 1 makes every combine weight 1, so the"
        " language-model loss never trains the router; use weighting = raw, or top_k >= 2"
        " (loading and inference accept it)"
      )


def _check_number(field: dataclasses.Field, value: object) -> None:
  """Refuses what is no number, and a fraction where a count is meant."""
  if value is None and field.type == int | None:
    return
  kind, words = (
    (numbers.Real, "a number") if field.type is float else (numbers.Integral, "an integer")
  )
  # A bool is an int to Python, never to the user.
  _require(isinstance(value, kind) and not isinstance(value, bool), field.name, repr(value), words)


def _require(holds: bool, name: str, value, expected: str) -> None:
  if not holds:
    raise UserError(f"{name} = {value} is refused: it must be {expected}")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["token", "expert", "slot", "weight", "valid", "losses", "metrics"],
  meta_fields=["num_tokens", "num_experts", "capacity", "top_k"],
)
@dataclasses.dataclass(frozen=True)
class RoutingPlan:
  """What the router decided: a flat list of assignments of static size, for each group.

  Attributes:
    token: (G, N) int32, the token's index in its group.
    expert: (G, N) int32, the expert's id.
    slot: (G, N) int32, its place in that expert's buffer, below C where valid. Two valid
      assignments of a group never share (expert, slot).
    weight: (G, N) float32, the combine weight, 0 where not valid.
    valid: (G, N) bool, False where dropped, not selected, or padding.
    losses: `load_balance`, `router_z`: float32 scalars, not yet multiplied by their coefficients.
    metrics: see `moe_jax.moe.metrics`.
    num_tokens: S. num_experts: E. capacity: C; S when dropless, which is always enough.
    top_k: K if N = S*K in token-major order, which lets combine sum without a scatter; None if
      assignments come in any other order.
  """

  token: jax.Array
  expert: jax.Array
  slot: jax.Array
  weight: jax.Array
  valid: jax.Array
  losses: dict[str, jax.Array]
  metrics: dict[str, jax.Array]
  num_tokens: int
  num_experts: int
  capacity: int
  top_k: int | None = None

  def dispatch_mask(self) -> jax.Array:
    """Returns (G, S, E, C) bool: token s sits in slot c of expert e."""
    return self._scatter(self.valid)

  def combine_weights(self) -> jax.Array:
    """Returns (G, S, E, C) float32: the weight of slot c of expert e in token s's output."""
    return self._scatter(self.weight)

  def _scatter(self, values_GN: jax.Array) -> jax.Array:
    groups_GN = jnp.arange(self.token.shape[0])[:, None]
    shape = (self.token.shape[0], self.num_tokens, self.num_experts, self.capacity)
    # A slot beyond C marks an assignment that has none; "drop" leaves it out.
    slot_GN = jnp.where(self.valid, self.slot, self.capacity)
    return (
      jnp.zeros(shape, values_GN.dtype)
      .at[groups_GN, self.token, self.expert, slot_GN]
      .set(values_GN, mode="drop")
    )
