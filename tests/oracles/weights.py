"""Weigh the chosen experts of one token, float64, and take the gradient back to its logits.

Weights are those of GShard arXiv 2006.16668 (normalised before drops), Mixtral arXiv 2401.04088
(softmax over the selected) and, for two levels, arXiv 1701.06538 Eq. 12.
"""

import numpy as np
from oracles import scores as score_functions
from oracles.scores import softmax, softmax_backward


def weigh(logits, scores, experts, kept, options):
  """Return one weight per chosen expert, 0.0 where it was not kept.

  Args:
    logits, scores: of one token.
    experts: its chosen experts; none for padding.
    kept: for each of them whether it counts: "renormalized" divides by the norm over all chosen,
      "renormalized_after_drop" by the norm over the kept ones alone.
    options: the `Options`.
  """
  chosen = [float(scores[expert]) for expert in experts]
  if not experts:
    return []
  if options.weighting == "softmax_selected":
    weights = softmax_selected(logits, experts, options)
  elif options.weighting in ("hard", "straight_through"):
    weights = [1.0] * len(experts)
  else:
    divisor = norm(chosen, kept, options)
    weights = [value / divisor if divisor else 0.0 for value in chosen]
  return [
    weight * options.weight_scale if held else 0.0
    for weight, held in zip(weights, kept, strict=True)
  ]


def norm(chosen, kept, options):
  """Return what the scores are divided by."""
  if options.weighting == "raw":
    return 1.0
  if options.weighting == "renormalized_after_drop":
    chosen = [value for value, held in zip(chosen, kept, strict=True) if held]
  order = options.norm_order
  return sum(value**order for value in chosen) ** (1.0 / order) if any(chosen) else 0.0


def softmax_selected(logits, experts, options):
  """Return the softmax over the chosen logits; of both levels for "hierarchical"."""
  if options.selection != "hierarchical":
    return list(softmax([logits[expert] for expert in experts]))
  gates, outer, inner = chosen_levels(logits, experts, options)
  p_outer = softmax(outer)
  return [p_outer[index] * p for index in range(len(gates)) for p in softmax(inner[index])]


def chosen_levels(logits, experts, options):
  """Return the chosen gates, their logits, and the logits of the chosen experts in each."""
  first, _ = score_functions.two_levels(logits, options.num_expert_groups)
  size = (len(logits) - len(first)) // len(first)
  per_gate = len(experts) // options.top_expert_groups
  parts = [experts[start : start + per_gate] for start in range(0, len(experts), per_gate)]
  gates = [part[0] // size for part in parts]
  return gates, [first[gate] for gate in gates], [[logits[e] for e in part] for part in parts]


def weigh_backward(logits, scores, experts, kept, d_weights, options):
  """Return the gradient of one token's logits, given that of its weights; choices held fixed.

  With n = (sum_j s_j^p)^(1/p) over the experts that share the norm, w_k = s_k / n and
    ds_j = dw_j / n - (s_j / n)^(p - 1) * sum_k dw_k s_k / n^2.
  "straight_through" has the gradient of the bare score, "hard" none.
  """
  d_weights = [
    d * options.weight_scale if held else 0.0 for d, held in zip(d_weights, kept, strict=True)
  ]
  if options.weighting == "softmax_selected":
    return softmax_selected_backward(logits, experts, d_weights, options)
  d_scores = np.zeros(len(scores))
  if options.weighting in ("raw", "straight_through"):
    for expert, d in zip(experts, d_weights, strict=True):
      d_scores[expert] = d
  elif options.weighting != "hard":
    d_scores = norm_backward(scores, experts, kept, d_weights, options)
  return score_functions.score_backward(logits, d_scores, options)


def norm_backward(scores, experts, kept, d_weights, options):
  """Return the gradient of the scores of one token through the division by their norm."""
  d_scores = np.zeros(len(scores))
  divisor = norm([scores[expert] for expert in experts], kept, options)
  if not divisor:
    return d_scores
  inside = sum(d * scores[expert] for d, expert in zip(d_weights, experts, strict=True))
  for expert, held, d in zip(experts, kept, d_weights, strict=True):
    shares = held or options.weighting == "renormalized"
    if shares and scores[expert] > 0:
      slope = (scores[expert] / divisor) ** (options.norm_order - 1.0)
      d_scores[expert] = d / divisor - slope * inside / divisor**2
  return d_scores


def softmax_selected_backward(logits, experts, d_weights, options):
  """Return the gradient of one token's logits through the softmax over the chosen ones."""
  d_logits = np.zeros(len(logits))
  if options.selection != "hierarchical":
    chosen = softmax([logits[expert] for expert in experts])
    d_logits[experts] = softmax_backward(chosen, d_weights)
    return d_logits
  gates, outer, inner = chosen_levels(logits, experts, options)
  p_outer, d_outer, start = softmax(outer), [], 0
  for index, part in enumerate(inner):
    p_inner, own = softmax(part), slice(start, start + len(part))
    d = np.array(d_weights[own])
    d_outer.append(sum(d * p_inner))
    d_logits[experts[own]] = softmax_backward(p_inner, d * p_outer[index])
    start += len(part)
  first = len(logits) - options.num_expert_groups
  d_logits[[first + gate for gate in gates]] = softmax_backward(p_outer, d_outer)
  return d_logits
