"""Turn the logits of one token into scores, float64, and a gradient of the scores back into logits.

Softmax and sigmoid scores: DeepSeek-V3 arXiv 2412.19437 Eq. 15; ReLU: ReMoE arXiv 2412.14711 Eq. 5;
two levels of softmax: arXiv 1701.06538 appendix B.
"""

import math

import numpy as np
from oracles import decisions

# ln(1 + exp(z)) is positive for every z, however small. Float32 code has to stop at its smallest
# normal number, so as not to take an expert that is hardly wanted for one that is refused.
SMALLEST_SOFTPLUS = 2.0**-126


def softmax(logits):
  """Return the float64 softmax of one vector, shifted by its maximum against overflow."""
  logits = np.asarray(logits, np.float64)
  shifted = [math.exp(logit - max(logits)) for logit in logits]
  return np.array([value / sum(shifted) for value in shifted])


def sigmoid(logit):
  """Return 1 / (1 + exp(-z)) without overflow."""
  return 1.0 / (1.0 + math.exp(-logit)) if logit >= 0 else 1.0 - sigmoid(-logit)


def softplus(logit):
  """Return ln(1 + exp(z)) without overflow."""
  return max(logit, 0.0) + math.log1p(math.exp(-abs(logit)))


def sqrt_softplus(logit):
  """Return sqrt(ln(1 + exp(z))), never below that of the smallest softplus."""
  return math.sqrt(max(softplus(logit), SMALLEST_SOFTPLUS))


def sqrt_softplus_slope(logit):
  """Return the derivative of `sqrt_softplus`: 0 where it is held at its smallest value."""
  held = softplus(logit) <= SMALLEST_SOFTPLUS
  return 0.0 if held else sigmoid(logit) / (2.0 * sqrt_softplus(logit))


def score(logits, options):
  """Return the scores (E or more,) of one token's logits (E',)."""
  if options.selection == "hierarchical":
    return hierarchical(logits, options.num_expert_groups)
  if options.score == "softmax":
    return softmax(logits)
  one = {
    "sigmoid": sigmoid,
    "sqrt_softplus": sqrt_softplus,
    "relu": lambda logit: max(logit, 0.0),
  }[options.score]
  return np.array([one(float(logit)) for logit in logits])


def score_backward(logits, d_scores, options):
  """Return the gradient of one token's logits (E',), given that of its scores."""
  if options.selection == "hierarchical":
    return hierarchical_backward(logits, d_scores, options.num_expert_groups)
  if options.score == "softmax":
    return softmax_backward(softmax(logits), d_scores)
  slope = {
    "sigmoid": lambda logit: sigmoid(logit) * sigmoid(-logit),
    "sqrt_softplus": sqrt_softplus_slope,
    "relu": lambda logit: float(logit > 0),
  }[options.score]
  return np.array([slope(float(z)) * d for z, d in zip(logits, d_scores, strict=True)])


def softmax_backward(scores, d_scores):
  """Return the logits' gradient of one softmax: p * (dp - sum(dp * p))."""
  mean = sum(d * p for d, p in zip(d_scores, scores, strict=True))
  return np.array([p * (d - mean) for d, p in zip(d_scores, scores, strict=True)])


def two_levels(logits, gates):
  """Return the first-level logits (gates,), and a list of the second-level ones of each gate."""
  experts = len(logits) - gates
  size = experts // gates
  return logits[experts:], [logits[gate * size : (gate + 1) * size] for gate in range(gates)]


def hierarchical(logits, gates):
  """Return P(gate) * P(expert | gate) of every expert."""
  first, second = two_levels(logits, gates)
  products = [
    p * q for p, inner in zip(softmax(first), second, strict=True) for q in softmax(inner)
  ]
  return np.array(products)


def hierarchical_backward(logits, d_scores, gates):
  """Return the gradient of both levels' logits by the product rule."""
  first, second = two_levels(logits, gates)
  p_gate, d_gate, d_inner = softmax(first), [], []
  for gate, inner in enumerate(second):
    p_inner = softmax(inner)
    d = d_scores[gate * len(inner) : (gate + 1) * len(inner)]
    d_gate.append(sum(d * p_inner))
    d_inner.extend(softmax_backward(p_inner, d * p_gate[gate]))
  return np.array([*d_inner, *softmax_backward(p_gate, d_gate)])


def probabilities(scores, options):
  """Return what the balance loss averages: sigmoid-like scores are divided by their sum."""
  if options.selection != "hierarchical" and options.score in ("sigmoid", "sqrt_softplus"):
    total = sum(scores)
    return np.array([value / total if total else 0.0 for value in scores])
  return np.asarray(scores)


def limit_to_groups(ranking, options):
  """Return the ranking with -inf for every expert outside the token's best groups.

  A group's score is its best expert's (DeepSeek-V2, arXiv 2405.04434 section 2.1.2) or the sum of
  its two best (DeepSeek-V3, arXiv 2412.19437 section 2.1.2).
  """
  size = len(ranking) // options.num_expert_groups
  counted = {"max": 1, "top2_sum": 2}[options.group_score]
  groups = [ranking[start : start + size] for start in range(0, len(ranking), size)]
  group_scores = [sum(sorted(group, reverse=True)[:counted]) for group in groups]
  allowed = decisions.best_first(group_scores)[: options.top_expert_groups]
  return [value if index // size in allowed else -math.inf for index, value in enumerate(ranking)]


def runs(segment_ids):
  """Return lists of neighbouring tokens with equal ids."""
  found = []
  for token, segment in enumerate(segment_ids):
    if token == 0 or segment != segment_ids[token - 1]:
      found.append([])
    found[-1].append(token)
  return found


def mean_of_segments(values, token_mask, segment_ids):
  """Return (S, E): every real token has the mean over the real tokens of its run."""
  result = np.zeros(np.shape(values))
  for run in runs(segment_ids):
    members = [token for token in run if token_mask[token]]
    for token in members:
      result[token] = sum(values[member] for member in members) / len(members)
  return result
