"""Route tokens to experts with plain loops: the outside judge of every router that has slots.

One group at a time, float64, no vectorised shortcut. Letters: S tokens per group, E experts, K
choices per token, C slots per expert. Dropless routing is capacity S: an expert is chosen at most
once per token.

Papers: GShard arXiv 2006.16668 (Algorithm 1), Switch arXiv 2101.03961, V-MoE arXiv 2106.05974.
"""

import dataclasses
import math

import numpy as np

WEIGHTINGS = ("raw", "renormalized", "renormalized_after_drop", "softmax_selected")


@dataclasses.dataclass
class Assignment:
  """One wish of one token for one expert; `slot` is -1 and `weight` 0.0 when the expert was full.

  `choice` is 0 for the token's best expert. A wish that was never made (a padding token, a random
  second expert that lost its draw) is no assignment at all, so that a dropped one always means a
  full expert.
  """

  token: int
  choice: int
  expert: int
  slot: int
  weight: float


@dataclasses.dataclass
class GroupRouting:
  """What one group's routing decided.

  Attributes:
    scores: (S, E) float64 softmax of the logits, pads included.
    dispatch: (S, E, C) bool, True where a token holds a slot.
    combine: (S, E, C) float64 weight of that slot in the token's output.
    assignments: every wish of a real token, in the order in which slots were given.
  """

  scores: np.ndarray
  dispatch: np.ndarray
  combine: np.ndarray
  assignments: list


def check_option(name, value, allowed):
  """Refuse an option the oracle does not know, so that a misspelt test cannot pass by accident."""
  if value not in allowed:
    raise ValueError(f"{name}={value!r} is not one of {allowed}.")


def softmax(logits):
  """Return the float64 softmax of one vector, shifted by its maximum against overflow."""
  logits = np.asarray(logits, np.float64)
  shifted = [math.exp(logit - max(logits)) for logit in logits]
  return np.array([value / sum(shifted) for value in shifted])


def top_experts(scores, top_k):
  """Return the ids of the K largest scores of one token, best first; ties go to the lower id."""
  by_score = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))
  return by_score[:top_k]


def selected_weights(logits, scores, experts, weighting):
  """Return one token's weight per chosen expert, as known before anything is placed.

  "raw" and "renormalized_after_drop" both start from the bare score: the second is divided later,
  by the sum of what was kept.
  """
  if weighting == "renormalized":
    total = sum(scores[expert] for expert in experts)
    return [scores[expert] / total for expert in experts]
  if weighting == "softmax_selected":
    return list(softmax([logits[expert] for expert in experts]))
  return [scores[expert] for expert in experts]


def second_expert_is_used(scores, experts, draw):
  """Decide GShard's random second expert: use it when 2 * g2 > u, with g2 = p2 / (p1 + p2)."""
  first, second = experts
  renormalized_second = scores[second] / (scores[first] + scores[second])
  return 2.0 * renormalized_second > draw


def token_order(scores, priority):
  """Return token ids in the order in which they are served.

  "position" is left to right; "max_score" is V-MoE's batch prioritised routing: the token with the
  largest best score first, equal ones left to right.
  """
  tokens = list(range(len(scores)))
  if priority == "max_score":
    tokens.sort(key=lambda token: -max(scores[token]))
  return tokens


def serving_order(tokens, top_k, drop_order):
  """Return (token, choice) pairs in the order in which slots are given."""
  if drop_order == "choice_major":
    return [(token, choice) for choice in range(top_k) for token in tokens]
  return [(token, choice) for token in tokens for choice in range(top_k)]


def route_group(
  logits,
  *,
  top_k,
  capacity,
  weighting="raw",
  drop_order="choice_major",
  priority="position",
  second_expert="always",
  second_expert_draws=None,
  token_mask=None,
):
  """Route one group of tokens.

  Args:
    logits: (S, E) router logits.
    top_k: K, experts per token.
    capacity: C, slots per expert.
    weighting: one of WEIGHTINGS; "renormalized" divides by the sum over the K chosen experts,
      before drops.
    drop_order: "choice_major" (all first choices, then all second ones) or "token_major".
    priority: "position" or "max_score"; see `token_order`.
    second_expert: "always" or "random"; the latter needs top_k=2 and the draws.
    second_expert_draws: (S,) uniform numbers in [0, 1).
    token_mask: (S,) True for a real token; all are real when None.

  Returns:
    A GroupRouting. A second expert that is not used takes no slot and leaves the first weight as it
    was.
  """
  check_option("weighting", weighting, WEIGHTINGS)
  check_option("drop_order", drop_order, ("choice_major", "token_major"))
  check_option("priority", priority, ("position", "max_score"))
  check_option("second_expert", second_expert, ("always", "random"))
  logits = np.asarray(logits, np.float64)
  scores = np.array([softmax(row) for row in logits])
  wishes = []
  for token, choice in serving_order(token_order(scores, priority), top_k, drop_order):
    if token_mask is not None and not token_mask[token]:
      continue
    experts = top_experts(scores[token], top_k)
    if second_expert == "random" and choice == 1:
      if not second_expert_is_used(scores[token], experts, second_expert_draws[token]):
        continue
    weights = selected_weights(logits[token], scores[token], experts, weighting)
    wishes.append((token, choice, experts[choice], weights[choice]))

  assignments = place(wishes, scores.shape[1], capacity)
  if weighting == "renormalized_after_drop":
    renormalize_kept(assignments)
  dispatch, combine = masks(assignments, scores.shape, capacity)
  return GroupRouting(scores, dispatch, combine, assignments)


def place(wishes, num_experts, capacity):
  """Give slots in the order of `wishes`: (token, choice, expert, weight) tuples."""
  used = [0] * num_experts
  assignments = []
  for token, choice, expert, weight in wishes:
    if used[expert] < capacity:
      assignments.append(Assignment(token, choice, expert, used[expert], float(weight)))
      used[expert] += 1
    else:
      assignments.append(Assignment(token, choice, expert, -1, 0.0))
  return assignments


def renormalize_kept(assignments):
  """Divide every kept weight by the sum of its token's kept weights, in place."""
  kept_sum = {}
  for one in assignments:
    kept_sum[one.token] = kept_sum.get(one.token, 0.0) + one.weight
  for one in assignments:
    if one.slot >= 0:
      one.weight /= kept_sum[one.token]


def masks(assignments, scores_shape, capacity):
  """Return the (S, E, C) dispatch and combine arrays of a list of assignments."""
  dispatch = np.zeros((*scores_shape, capacity), bool)
  combine = np.zeros((*scores_shape, capacity), np.float64)
  for one in assignments:
    if one.slot >= 0:
      dispatch[one.token, one.expert, one.slot] = True
      combine[one.token, one.expert, one.slot] = one.weight
  return dispatch, combine


def route(logits, *, token_mask=None, second_expert_draws=None, **options):
  """Route every group on its own.

  Args:
    logits: (G, S, E) router logits.
    token_mask: (G, S) True for a real token, or None.
    second_expert_draws: (G, S) uniform numbers, or None.
    **options: as in `route_group`.

  Returns:
    A list of G GroupRouting.
  """
  return [
    route_group(
      logits[group],
      token_mask=None if token_mask is None else token_mask[group],
      second_expert_draws=None if second_expert_draws is None else second_expert_draws[group],
      **options,
    )
    for group in range(len(logits))
  ]
