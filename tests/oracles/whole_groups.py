"""Select experts for a whole group at once, with plain loops in float64.

Expert choice (arXiv 2202.09368), Sinkhorn balancing (S-BASE, arXiv 2202.01169), balanced assignment
(BASE, arXiv 2103.16716). Letters: S tokens per group, E experts, C slots per expert.
"""

import math

import numpy as np
from oracles import losses
from oracles.routing import Assignment, check_option
from oracles.scores import softmax, softmax_backward


def scores_of(logits_SE, score):
  """Return the (S, E) scores: "softmax" over experts, or "sigmoid" of each by itself."""
  check_option("score", score, ("softmax", "sigmoid"))
  if score == "softmax":
    return np.array([softmax(row) for row in logits_SE])
  return np.array([[1.0 / (1.0 + math.exp(-z)) for z in row] for row in logits_SE])


def real_tokens(token_mask, num_tokens):
  """Return the ids of the tokens that are not padding."""
  return [token for token in range(num_tokens) if token_mask is None or token_mask[token]]


def expert_choice(logits_SE, *, capacity, score="softmax", token_mask=None):
  """Return the assignments in which every expert takes the tokens that score it highest.

  I = TopK(S^T, k), G = the scores taken, with k = `capacity` (arXiv 2202.09368 section 3.2). Slot c
  holds the expert's c-th best token; of equal tokens the earlier one is taken first.
  """
  scores_SE = scores_of(logits_SE, score)
  assignments = []
  for expert in range(scores_SE.shape[1]):
    tokens = real_tokens(token_mask, len(scores_SE))
    tokens.sort(key=lambda token, e=expert: -scores_SE[token, e])
    for slot, token in enumerate(tokens[:capacity]):
      weight = float(scores_SE[token, expert])
      assignments.append(Assignment(token, 0, expert, slot, weight))
  return assignments


def sinkhorn_matrix(logits_SE, *, iterations, token_mask=None):
  """Return (S, E): exp(logits) after `iterations` scalings of token rows, then expert columns.

  Megatron-core's `sinkhorn` without its tolerance and its constant 1 / S and 1 / E; only real
  tokens are summed. A padding row is scaled like any other and counts nowhere.
  """
  cost_SE = np.exp(np.asarray(logits_SE, np.float64))
  num_tokens, num_experts = cost_SE.shape
  real = real_tokens(token_mask, num_tokens)
  column = [1.0] * num_experts
  row = [1.0] * num_tokens
  for _ in range(iterations):
    for token in range(num_tokens):
      row[token] = 1.0 / sum(cost_SE[token, e] * column[e] for e in range(num_experts))
    for expert in range(num_experts):
      total = sum(cost_SE[token, expert] * row[token] for token in real)
      column[expert] = 1.0 / total if real else 1.0
  return np.array(row)[:, None] * cost_SE * np.array(column)[None, :]


def one_expert_each(experts, scores_SE, *, capacity, token_mask=None):
  """Return the assignments of tokens that ask for one expert each, served left to right."""
  real = real_tokens(token_mask, len(scores_SE))
  wishes = [(token, 0, experts[token], scores_SE[token][experts[token]]) for token in real]
  return place(wishes, len(scores_SE[0]), capacity)


def place(wishes, num_experts, capacity):
  """Return assignments: slots in the order of `wishes`, (token, choice, expert, weight) tuples."""
  used = [0] * num_experts
  assignments = []
  for token, choice, expert, weight in wishes:
    if used[expert] < capacity:
      assignments.append(Assignment(token, choice, expert, used[expert], float(weight)))
      used[expert] += 1
    else:
      assignments.append(Assignment(token, choice, expert, -1, 0.0))
  return assignments


def masks(assignments, shape, capacity):
  """Return dispatch (S, E, C) bool and combine (S, E, C) float64 of a list of assignments."""
  dispatch = np.zeros((*shape, capacity), bool)
  combine = np.zeros((*shape, capacity), np.float64)
  for one in assignments:
    if one.slot >= 0:
      dispatch[one.token, one.expert, one.slot] = True
      combine[one.token, one.expert, one.slot] = one.weight
  return dispatch, combine


def group_losses(logits_GSE, groups, *, token_mask):
  """Return load balance, z-loss and importance of groups of assignments, softmax scores.

  Load balance is E * sum_e f_e * P_e of each group with a real token, averaged, where f counts the
  assignments asked for; importance the squared coefficient of variation of the scores' sums,
  averaged over the same groups.
  """
  num_experts = np.shape(logits_GSE)[2]
  balance, importance = [], []
  for logits_SE, mask_S, assignments in zip(logits_GSE, token_mask, groups, strict=True):
    real = real_tokens(mask_S, len(mask_S))
    if not real:
      continue
    scores_SE = scores_of(logits_SE, "softmax")
    total = [sum(scores_SE[token, e] for token in real) for e in range(num_experts)]
    mean = sum(total) / num_experts
    spread = sum((value - mean) ** 2 for value in total) / num_experts
    importance.append(spread / mean**2)
    asked = [sum(one.expert == e for one in assignments) for e in range(num_experts)]
    products = (f * p for f, p in zip(asked, total, strict=True))
    balance.append(num_experts * sum(products) / len(real) ** 2)
  groups_with_tokens = max(len(balance), 1)
  return {
    "load_balance": sum(balance) / groups_with_tokens,
    "router_z": losses.router_z_loss(logits_GSE, token_mask=token_mask),
    "importance": sum(importance) / groups_with_tokens,
  }


def raw_score_backward(logits_SE, d_weights_SE, score):
  """Return (S, E) the logits' gradient where a weight is the score itself; choices are fixed."""
  scores_SE = scores_of(logits_SE, score)
  if score == "softmax":
    pairs = zip(scores_SE, d_weights_SE, strict=True)
    return np.array([softmax_backward(p_E, dw_E) for p_E, dw_E in pairs])
  return scores_SE * (1.0 - scores_SE) * d_weights_SE
