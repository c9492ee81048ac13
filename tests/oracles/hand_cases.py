"""Routing problems of three tokens and three experts, solved by hand.

Each case gives the softmax scores; the logits are ln(score) + the token's shift. A shift changes no
score and makes logsumexp of the token equal to the shift, so the z-loss can be written down too.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class HandCase:
  """One problem and its solution.

  Attributes:
    name: says what the case shows.
    scores: 3 rows of 3 probabilities, tokens by experts.
    options: keyword arguments of `routing.route_group`, apart from the mask and the draws.
    kept: (token, expert, slot, weight) of every assignment that found a slot.
    dropped: (token, expert) of every assignment that found its expert full.
    shifts: logsumexp of each token's logits. Zero where two tokens tie, since another shift could
      break the tie by rounding.
    token_mask: True for a real token.
    select_draws: uniform numbers for selection="random_second", or None.
    losses: expected values, by the name of `LOSSES`; empty when not worked out.
    metrics: expected values, by the name of the function in `metrics`; empty when not worked out.
  """

  name: str
  scores: tuple
  options: dict
  kept: tuple
  dropped: tuple
  shifts: tuple = (1.0, 2.0, 3.0)
  token_mask: tuple = (True, True, True)
  select_draws: tuple | None = None
  losses: dict = dataclasses.field(default_factory=dict)
  metrics: dict = dataclasses.field(default_factory=dict)

  @property
  def logits(self):
    """Return (1, 3, 3) float64 router logits, one group."""
    return (np.log(self.scores) + np.array(self.shifts)[:, None])[None]

  @property
  def mask(self):
    """Return (1, 3) bool, True for a real token."""
    return np.array([self.token_mask])

  @property
  def dispatch(self):
    """Return the expected (1, 3, 3, C) bool dispatch."""
    return self.combine > 0.0

  @property
  def combine(self):
    """Return the expected (1, 3, 3, C) float64 combine weights; no kept weight is zero here."""
    combine = np.zeros((1, 3, 3, self.options["capacity"]))
    for token, expert, slot, weight in self.kept:
      combine[0, token, expert, slot] = weight
    return combine


# Arguments of losses.load_balance_loss (and of router_z_loss for the names that start with "z").
LOSSES = {
  "switch": {"kind": "switch"},
  "gshard": {"kind": "gshard"},
  "all_choices": {"kind": "all_choices"},
  "all_choices_flaxformer": {"kind": "all_choices", "padding": "flaxformer"},
  "z": {},
  "z_flaxformer": {"padding": "flaxformer"},
}

# Tokens 0 and 1 both want expert 0; nobody wants expert 1.
ONE_CHOICE = ((0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.2, 0.3, 0.5))

# First choices 0, 1, 2 are all different; second choices 1, 0, 1 meet them.
TWO_CHOICES = ((0.5, 0.4, 0.1), (0.3, 0.6, 0.1), (0.1, 0.4, 0.5))

TOP_1 = HandCase(
  name="top_1_second_token_is_dropped",
  scores=ONE_CHOICE,
  options={"top_k": 1, "capacity": 1},
  # Left to right: token 0 takes the only slot of expert 0, token 1 finds it full.
  kept=((0, 0, 0, 0.7), (2, 2, 0, 0.5)),
  dropped=((1, 0),),
  losses={
    # f = (2, 0, 1)/3, P = (1.5, 0.8, 0.7)/3: 3 * (2*1.5 + 1*0.7)/9 = 3.7/3; K=1, so all kinds
    # agree.
    "switch": 3.7 / 3,
    "gshard": 3.7 / 3,
    "all_choices": 3.7 / 3,
    # (1 + 4 + 9)/3
    "z": 14 / 3,
  },
  metrics={
    "load": (2, 0, 1),
    # -(2/3 ln 2/3 + 1/3 ln 1/3)/ln 3 = (0.270310 + 0.366204)/1.098612
    "load_entropy": 0.579380,
    # 2 / 1 - 1
    "max_violation": 1.0,
    "dropped_assignments": 1 / 3,
    "dropped_token_fraction": 1 / 3,
    "dead_experts": 1,
    # (0.7 + 0.6 + 0.5)/3
    "router_confidence": 0.6,
    # 2 of 3 slots
    "capacity_utilisation": 2 / 3,
    # 3 slots for 3 wishes
    "slots_per_assignment": 1.0,
  },
)

CHOICE_MAJOR = HandCase(
  name="choice_major_serves_all_first_choices",
  scores=TWO_CHOICES,
  options={
    "top_k": 2,
    "capacity": 1,
    "weighting": "renormalized",
    "drop_order": "choice_major",
  },
  # The first choices fill all three experts: weights 0.5/0.9, 0.6/0.9, 0.5/0.9.
  kept=((0, 0, 0, 5 / 9), (1, 1, 0, 2 / 3), (2, 2, 0, 5 / 9)),
  dropped=((0, 1), (1, 0), (2, 1)),
  losses={
    # First choices are uniform, so 3 * sum(1/3 * P) = 1.
    "switch": 1.0,
    "gshard": 1.0,
    # f = (2, 3, 1)/3, P = (0.9, 1.4, 0.7)/3: 3 * (1.8 + 4.2 + 0.7)/9
    "all_choices": 6.7 / 3,
    "z": 14 / 3,
  },
  metrics={
    "load": (2, 3, 1),
    # f = (1/3, 1/2, 1/6): (0.366204 + 0.346574 + 0.298627)/1.098612
    "load_entropy": 0.920620,
    # 3 / 2 - 1
    "max_violation": 0.5,
    "dropped_assignments": 0.5,
    "dropped_token_fraction": 0.0,
    "dead_experts": 0,
    # (0.5 + 0.6 + 0.5)/3
    "router_confidence": 1.6 / 3,
    "capacity_utilisation": 1.0,
    # 3 slots for 6 wishes
    "slots_per_assignment": 0.5,
  },
)

TOKEN_MAJOR = HandCase(
  name="token_major_serves_the_first_token_twice",
  scores=TWO_CHOICES,
  options={
    "top_k": 2,
    "capacity": 1,
    "weighting": "renormalized",
    "drop_order": "token_major",
  },
  # Token 0 takes experts 0 and 1, which are both of token 1's; token 2 still finds expert 2.
  kept=((0, 0, 0, 5 / 9), (0, 1, 0, 4 / 9), (2, 2, 0, 5 / 9)),
  dropped=((1, 1), (1, 0), (2, 1)),
  metrics={
    "load": (2, 3, 1),
    "dropped_assignments": 0.5,
    "dropped_token_fraction": 1 / 3,
    "capacity_utilisation": 1.0,
  },
)

CHOICE_MAJOR_AFTER_DROP = HandCase(
  name="choice_major_renormalized_after_drop",
  scores=TWO_CHOICES,
  options={**CHOICE_MAJOR.options, "weighting": "renormalized_after_drop"},
  # One expert is left to each token, so each weight is 1.
  kept=((0, 0, 0, 1.0), (1, 1, 0, 1.0), (2, 2, 0, 1.0)),
  dropped=((0, 1), (1, 0), (2, 1)),
)

TOKEN_MAJOR_AFTER_DROP = HandCase(
  name="token_major_renormalized_after_drop",
  scores=TWO_CHOICES,
  options={**TOKEN_MAJOR.options, "weighting": "renormalized_after_drop"},
  # Token 0 keeps both (0.5 and 0.4 of 0.9), token 2 one, token 1 none: no division by zero.
  kept=((0, 0, 0, 5 / 9), (0, 1, 0, 4 / 9), (2, 2, 0, 1.0)),
  dropped=((1, 1), (1, 0), (2, 1)),
)

SOFTMAX_SELECTED = HandCase(
  name="softmax_over_the_selected_without_drops",
  scores=TWO_CHOICES,
  options={"top_k": 2, "capacity": 3, "weighting": "softmax_selected"},
  # exp(ln p_k) / sum over the selected = p_k / (p_1 + p_2). Slots: all first choices come before.
  kept=(
    (0, 0, 0, 5 / 9),
    (1, 1, 0, 2 / 3),
    (2, 2, 0, 5 / 9),
    (0, 1, 1, 4 / 9),
    (1, 0, 1, 1 / 3),
    (2, 1, 2, 4 / 9),
  ),
  dropped=(),
)

MAX_SCORE = HandCase(
  name="max_score_serves_the_most_certain_token_first",
  scores=((0.6, 0.3, 0.1), (0.7, 0.2, 0.1), (0.2, 0.3, 0.5)),
  options={"top_k": 1, "capacity": 1, "priority": "max_score"},
  # Order 1 (0.7), 0 (0.6), 2 (0.5): token 0 finds expert 0 full, although it stands first.
  kept=((1, 0, 0, 0.7), (2, 2, 0, 0.5)),
  dropped=((0, 0),),
)

MAX_SCORE_TOKEN_MAJOR = HandCase(
  name="max_score_token_major_serves_the_most_certain_token_twice",
  scores=TWO_CHOICES,
  options={
    "top_k": 2,
    "capacity": 1,
    "priority": "max_score",
    "drop_order": "token_major",
  },
  # Token 1 (0.6) is first and takes experts 1 and 0, which are both of token 0's.
  kept=((1, 1, 0, 0.6), (1, 0, 0, 0.3), (2, 2, 0, 0.5)),
  dropped=((0, 0), (0, 1), (2, 1)),
)

PADDING = HandCase(
  name="padding_takes_no_slot",
  scores=ONE_CHOICE,
  options={"top_k": 1, "capacity": 1},
  token_mask=(False, True, True),
  # Token 0 would have taken the slot that token 1 now gets.
  kept=((1, 0, 0, 0.6), (2, 2, 0, 0.5)),
  dropped=(),
  losses={
    # f = (1, 0, 1)/2, P = (0.8, 0.6, 0.6)/2: 3 * (0.8 + 0.6)/4
    "switch": 1.05,
    "gshard": 1.05,
    "all_choices": 1.05,
    # Divided by 3 tokens twice instead of by 2: 1.05 * 4/9
    "all_choices_flaxformer": 1.05 * 4 / 9,
    # (4 + 9)/2
    "z": 6.5,
    # The pad's logits count as zeros: (ln(3)^2 + 4 + 9)/3 = (1.206949 + 13)/3
    "z_flaxformer": 4.735650,
  },
  metrics={
    "load": (1, 0, 1),
    # ln 2 / ln 3
    "load_entropy": 0.630930,
    # 1 / (2/3) - 1
    "max_violation": 0.5,
    "dropped_assignments": 0.0,
    "dropped_token_fraction": 0.0,
    "dead_experts": 1,
    "router_confidence": 0.55,
    "capacity_utilisation": 2 / 3,
    # 3 slots for 2 wishes
    "slots_per_assignment": 1.5,
  },
)

PADDING_WITH_MAX_SCORE = HandCase(
  name="padding_takes_no_slot_however_certain",
  scores=ONE_CHOICE,
  options={"top_k": 1, "capacity": 1, "priority": "max_score"},
  token_mask=(False, True, True),
  kept=((1, 0, 0, 0.6), (2, 2, 0, 0.5)),
  dropped=(),
)

TIED_EXPERTS = HandCase(
  name="tied_experts_go_to_the_lower_id",
  scores=((0.4, 0.4, 0.2), (0.2, 0.4, 0.4), (1 / 3, 1 / 3, 1 / 3)),
  options={"top_k": 2, "capacity": 2},
  # Choices: (0, 1), (1, 2), (0, 1). First ones: token 0 -> expert 0, token 1 -> expert 1, token 2
  # -> expert 0; second ones: token 0 -> expert 1, token 1 -> expert 2, token 2 finds expert 1 full.
  kept=(
    (0, 0, 0, 0.4),
    (1, 1, 0, 0.4),
    (2, 0, 1, 1 / 3),
    (0, 1, 1, 0.4),
    (1, 2, 0, 0.4),
  ),
  dropped=((2, 1),),
  shifts=(0.0, 0.0, 0.0),
)

TIED_TOKENS = HandCase(
  name="tied_tokens_are_served_left_to_right",
  scores=((0.5, 0.3, 0.2), (0.5, 0.3, 0.2), (0.6, 0.3, 0.1)),
  options={"top_k": 1, "capacity": 2, "priority": "max_score"},
  # Order 2 (0.6), then 0 before 1 (both 0.5): token 1 is the one without a slot.
  kept=((2, 0, 0, 0.6), (0, 0, 1, 0.5)),
  dropped=((1, 0),),
  shifts=(0.0, 0.0, 0.0),
)

RANDOM_SECOND = HandCase(
  name="random_second_expert_that_loses_its_draw_takes_no_slot",
  scores=TWO_CHOICES,
  options={
    "top_k": 2,
    "capacity": 2,
    "weighting": "renormalized",
    "selection": "random_second",
  },
  # 2 * g2 = 8/9, 2/3, 8/9 against the draws: only token 0 loses (0.889 < 0.9). Its place at expert
  # 1 goes to token 2; its first weight stays 5/9.
  select_draws=(0.9, 0.5, 0.8),
  kept=(
    (0, 0, 0, 5 / 9),
    (1, 1, 0, 2 / 3),
    (2, 2, 0, 5 / 9),
    (1, 0, 1, 1 / 3),
    (2, 1, 1, 4 / 9),
  ),
  dropped=(),
)

CASES = (
  TOP_1,
  CHOICE_MAJOR,
  TOKEN_MAJOR,
  CHOICE_MAJOR_AFTER_DROP,
  TOKEN_MAJOR_AFTER_DROP,
  SOFTMAX_SELECTED,
  MAX_SCORE,
  MAX_SCORE_TOKEN_MAJOR,
  PADDING,
  PADDING_WITH_MAX_SCORE,
  TIED_EXPERTS,
  TIED_TOKENS,
  RANDOM_SECOND,
)
