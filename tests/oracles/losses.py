"""Compute router losses with plain loops, float64.

Every load-balance loss here is scaled so that uniform routing gives 1, or K where all K
choices count.
"""

import math

import numpy as np
from oracles import routing


def load_balance_loss(scores, selected, *, kind, scope="group", padding="exclude", token_mask=None):
  """Return the load-balance loss, E * sum_e f_e * P_e.

  f_e is the fraction of tokens that want expert e, before any drop; P_e is its mean score.

  Args:
    scores: (G, S, E) router probabilities.
    selected: (G, S, K) chosen expert ids, best first; unused by "switch".
    kind: what f counts. "switch" (arXiv 2101.03961 Eq. 4-6): the argmax of the scores. "gshard"
      (arXiv 2006.16668 Algorithm 1: (1/E) sum_e (c_e/S) m_e, here times E^2): the first choice.
      "all_choices": all K choices, so f sums to K and uniform routing gives K.
    scope: "group" takes the loss in each group and averages; "batch" pools the counts of all groups
      first.
    padding: "exclude" divides by the number of real tokens; an all-padding group has no loss and is
      left out of the average. "flaxformer" leaves pads out of both sums but divides by all S
      tokens, so the loss shrinks with the square of the real fraction.
    token_mask: (G, S) True for a real token; all are real when None.

  Returns:
    The loss; 0.0 when there is no real token.
  """
  routing.check_option("kind", kind, ("switch", "gshard", "all_choices"))
  routing.check_option("scope", scope, ("group", "batch"))
  routing.check_option("padding", padding, ("exclude", "flaxformer"))
  num_groups, num_tokens, num_experts = np.shape(scores)
  if token_mask is None:
    token_mask = np.ones((num_groups, num_tokens), bool)

  pools = [[group] for group in range(num_groups)] if scope == "group" else [range(num_groups)]
  losses = []
  for pool in pools:
    tokens = [(group, token) for group in pool for token in range(num_tokens)]
    real = [(group, token) for group, token in tokens if token_mask[group][token]]
    if padding == "exclude" and not real:
      continue
    divisor = len(real) if padding == "exclude" else len(tokens)
    wanted = [0.0] * num_experts
    importance = [0.0] * num_experts
    for group, token in real:
      for expert in counted_experts(scores[group][token], selected[group][token], kind):
        wanted[expert] += 1.0 / divisor
      for expert in range(num_experts):
        importance[expert] += float(scores[group][token][expert]) / divisor
    losses.append(num_experts * sum(f * p for f, p in zip(wanted, importance, strict=True)))
  return sum(losses) / len(losses) if losses else 0.0


def counted_experts(scores, selected, kind):
  """Return the experts that one token adds to the counts of `load_balance_loss`."""
  if kind == "switch":
    return routing.top_experts(scores, 1)
  if kind == "gshard":
    return [selected[0]]
  return list(selected)


def router_z_loss(logits, *, padding="exclude", token_mask=None):
  """Return the mean over tokens of logsumexp(logits)^2 (ST-MoE arXiv 2202.08906 Eq. 5).

  Args:
    logits: (G, S, E) router logits.
    padding: "exclude" takes the mean over real tokens of the whole batch; "flaxformer" sets the
      logits of pads to zero and takes the mean over all tokens, so that every pad adds ln(E)^2 to
      the sum.
    token_mask: (G, S) True for a real token; all are real when None.

  Returns:
    The loss; 0.0 when there is no real token.
  """
  routing.check_option("padding", padding, ("exclude", "flaxformer"))
  logits = np.asarray(logits, np.float64)
  squares = []
  for group in range(logits.shape[0]):
    for token in range(logits.shape[1]):
      is_real = token_mask is None or bool(token_mask[group][token])
      if is_real:
        squares.append(log_sum_exp(logits[group, token]) ** 2)
      elif padding == "flaxformer":
        squares.append(math.log(logits.shape[2]) ** 2)
  return sum(squares) / len(squares) if squares else 0.0


def log_sum_exp(logits):
  """Return ln(sum(exp(logits))) of one vector, shifted by its maximum against overflow."""
  largest = max(logits)
  return largest + math.log(sum(math.exp(logit - largest) for logit in logits))
