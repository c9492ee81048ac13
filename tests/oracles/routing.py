"""Route tokens to experts with plain loops: the outside judge of every token-choice router.

One group at a time, float64, no vectorised shortcut. Letters: S tokens per group, E experts, K
choices per token, C slots per expert.
"""

import dataclasses
import math

import numpy as np
from oracles import placement, weights
from oracles import scores as score_functions
from oracles.options import Options, check_option
from oracles.scores import softmax
from oracles.selection import SELECTIONS, View, top_experts

__all__ = [
  "Assignment",
  "GroupRouting",
  "check_option",
  "route",
  "route_group",
  "router_backward",
  "softmax",
  "top_experts",
]


@dataclasses.dataclass
class Assignment:
  """One wish of one token for one expert; `slot` is -1 and `weight` 0.0 when the expert was full.

  `choice` is 0 for the token's best expert. A wish that was never made (a padding token, a random
  second expert that lost its draw) is no assignment at all, so that a dropped one always means a
  full expert. `expert` is the one asked last and `wish` the one asked at first, with the weight
  `wish_weight` that it would have without any drop; they differ after re-routing alone.
  """

  token: int
  choice: int
  expert: int
  slot: int
  weight: float
  wish: int = -1
  wish_weight: float = 0.0


@dataclasses.dataclass
class GroupRouting:
  """What one group's routing decided.

  Attributes:
    options: the `Options`.
    logits: (S, E') float64, noise and mean over segments included; zeros for padding.
    scores: (S, E or more) float64, of padding too.
    chosen: for each token its K experts, as asked last; an empty list for padding.
    kept: for each token whether these have a slot, or are null experts that were asked.
    dispatch: (S, E, C) bool, True where a token holds a slot.
    combine: (S, E, C) float64 weight of that slot in the token's output.
    null_weight: (S,) float64, sum of the weights of null experts.
    assignments: every wish of a real token for an expert that has slots.
    segment_ids, token_mask: as given.
  """

  options: Options
  logits: np.ndarray
  scores: np.ndarray
  chosen: list
  kept: list
  dispatch: np.ndarray
  combine: np.ndarray
  null_weight: np.ndarray
  assignments: list
  segment_ids: object
  token_mask: object

  @property
  def probabilities(self):
    """Return (S, E) what the balance loss averages, null experts left out."""
    rows = [score_functions.probabilities(row, self.options) for row in self.scores]
    return np.array(rows)[:, : self.dispatch.shape[1]]


def route_group(
  logits,
  *,
  token_mask=None,
  token_ids=None,
  segment_ids=None,
  noise=None,
  bias=None,
  select_draws=None,
  place_draws=None,
  **options,
):
  """Route one group of tokens.

  Args:
    logits: (S, E') router logits; E' is E plus null experts, or plus first-level gates.
    token_mask: (S,) True for a real token; all are real when None.
    token_ids, segment_ids: (S,) integers, where the options read them.
    noise: (S, E') added to the logits of real tokens, after the mean over segments.
    bias: (E',) added to the scores for the choice of experts alone.
    select_draws: see `selection.View`.
    place_draws: (S,) for priority "random".
    **options: fields of `Options`.

  Returns:
    A GroupRouting.
  """
  options = Options(**options)
  mask = [True] * len(logits) if token_mask is None else [bool(real) for real in token_mask]
  logits = routed_logits(logits, mask, segment_ids, noise, options)
  scores = np.array([score_functions.score(row, options) for row in logits])
  extra = options.num_null_experts
  num_experts = scores.shape[1] - extra
  ranking = [rank(row, bias, options) for row in scores]
  ids = mask, token_ids, segment_ids
  view = View(options, num_experts, logits, scores, ranking, *ids, select_draws)
  choose = SELECTIONS[options.selection]
  choices = [choose(view, token) if real else ([], []) for token, real in enumerate(mask)]
  placed = place_choices(choices, view, place_draws)
  return finish(choices, placed, view, segment_ids, mask)


def routed_logits(logits, mask, segment_ids, noise, options):
  """Return (S, E') float64: zeros for padding, the segment's mean if asked for, plus noise."""
  rows = np.array(
    [
      np.float64(row) if real else 0.0 * np.zeros(len(row))
      for row, real in zip(logits, mask, strict=True)
    ]
  )
  if options.granularity == "segment":
    rows = score_functions.mean_of_segments(rows, mask, segment_ids)
  if noise is not None:
    rows = np.array(
      [
        row + draw if real else row
        for row, draw, real in zip(rows, np.float64(noise), mask, strict=True)
      ]
    )
  return rows


def rank(scores, bias, options):
  """Return what one token's choice goes by."""
  ranking = list(scores if bias is None else scores + np.float64(bias))
  grouped = options.num_expert_groups > 1 and options.selection != "hierarchical"
  return score_functions.limit_to_groups(ranking, options) if grouped else ranking


def place_choices(choices, view, draws):
  """Return {(token, choice): (expert asked last, slot)} of the wishes for experts with slots."""
  options = view.options
  asks = {
    (token, choice): expert
    for token, (experts, asked) in enumerate(choices)
    for choice, expert in enumerate(experts)
    if asked[choice] and expert < view.num_experts
  }
  if not asks:
    return {}
  width = max(len(experts) for experts, _ in choices)
  chosen_scores = [
    [view.scores[token][expert] for expert in experts] or [-math.inf] * width
    for token, (experts, _) in enumerate(choices)
  ]
  tokens = placement.token_order(view.scores, chosen_scores, options, draws)
  if options.priority == "weight":
    chosen_scores = weights_before_drops(choices, view)
  # What asks for nothing decides nothing by its place in the order.
  chosen_scores = [
    [row[choice] if (token, choice) in asks else -math.inf for choice in range(width)]
    for token, row in enumerate(chosen_scores)
  ]
  order = placement.serving_order(tokens, chosen_scores, options)
  ranked = [next_best(view, token, experts) for token, (experts, _) in enumerate(choices)]
  return placement.place(asks, order, ranked, options.capacity, options.reroute_attempts)


def weights_before_drops(choices, view):
  """Return for each token the weights that its choices would have without any drop."""
  rows = []
  for token, (experts, asked) in enumerate(choices):
    arguments = (view.logits[token], view.scores[token], experts, asked, view.options)
    rows.append(list(weights.weigh(*arguments)))
  return rows


def next_best(view, token, experts):
  """Return the experts that a token may ask and has not chosen, best first."""
  if not view.options.reroute_attempts:
    return []
  ranking = view.ranking[token]
  order = top_experts(ranking, len(ranking))
  return [expert for expert in order if expert not in experts and ranking[expert] > -math.inf]


def finish(choices, placed, view, segment_ids, mask):
  """Weigh what was placed and collect everything in a GroupRouting."""
  options, scores = view.options, view.scores
  shape = (len(scores), view.num_experts, options.capacity)
  dispatch, combine, null_weight = np.zeros(shape, bool), np.zeros(shape), np.zeros(len(scores))
  chosen, all_kept, assignments = [], [], {}
  for token, (experts, asked) in enumerate(choices):
    last = [placed.get((token, choice), (expert, -1)) for choice, expert in enumerate(experts)]
    final = [expert for expert, _ in last]
    kept = [
      slot >= 0 or (asked[choice] and expert >= view.num_experts)
      for choice, (expert, slot) in enumerate(last)
    ]
    arguments = (view.logits[token], scores[token])
    values = weights.weigh(*arguments, final, kept, options)
    wished = weights.weigh(*arguments, experts, asked, options)
    for choice, (expert, slot) in enumerate(last):
      if expert >= view.num_experts:
        null_weight[token] += values[choice]
      elif slot >= 0:
        dispatch[token, expert, slot], combine[token, expert, slot] = True, values[choice]
      if (token, choice) in placed:
        assignments[token, choice] = Assignment(
          token, choice, expert, slot, values[choice], experts[choice], wished[choice]
        )
    chosen.append(final)
    all_kept.append(kept)
  return GroupRouting(
    options,
    view.logits,
    scores,
    chosen,
    all_kept,
    dispatch,
    combine,
    null_weight,
    [assignments[pair] for pair in placed],
    segment_ids,
    mask,
  )


def route(logits, **options):
  """Route every group on its own.

  Args:
    logits: (G, S, E') router logits.
    **options: as in `route_group`; what differs between groups has a leading axis G there.

  Returns:
    A list of G GroupRouting.
  """
  by_group = ("token_mask", "token_ids", "segment_ids", "noise", "select_draws", "place_draws")
  return [
    route_group(
      logits[group],
      **{
        name: value[group] if name in by_group and value is not None else value
        for name, value in options.items()
      },
    )
    for group in range(len(logits))
  ]


def router_backward(group, d_weights):
  """Return the gradient of one group's logits; the choice of experts and slots is held fixed.

  Args:
    group: a GroupRouting.
    d_weights: (S, E or more), the gradient of the weight with which each token reached each expert.
      A null expert's column holds the gradient of its own weight.

  Returns:
    d_logits: (S, E') gradient of the logits as given.
    d_noise: (S, E') gradient of what was added to them.
  """
  d_noise = np.zeros(group.logits.shape)
  for token, experts in enumerate(group.chosen):
    if experts:
      d_noise[token] = weights.weigh_backward(
        group.logits[token],
        group.scores[token],
        experts,
        group.kept[token],
        [float(d_weights[token][expert]) for expert in experts],
        group.options,
      )
  if group.options.granularity == "segment":
    # The mean is its own transpose.
    return (
      score_functions.mean_of_segments(d_noise, group.token_mask, group.segment_ids),
      d_noise,
    )
  return d_noise, d_noise
