"""Run SparseMixer-v2 token by token in float64, as the released code of Phi-3.5-MoE does it.

`sparsemixer` in Hugging Face's modeling_phimoe.py (arXiv 2409.12136 section 2.1): K = 2 there, any
K here. The random numbers are arguments.
"""

import math

import numpy as np
from oracles.scores import softmax

JITTER = 0.01


def within_reach(logits, taken):
  """Return the experts not taken whose logit is not too far below the best of them.

  Too far: (best - logit) / max(|logit|, best) > 2 * jitter.
  """
  left = [expert for expert in range(len(logits)) if expert not in taken]
  best = max(logits[expert] for expert in left)
  reach = []
  for expert in left:
    gap, scale = best - logits[expert], max(abs(logits[expert]), best)
    # 0 / 0 is a NaN in the released code, which exceeds nothing.
    if scale == 0.0 or gap / scale <= 2 * JITTER:
      reach.append(expert)
  return reach


def pick(logits, taken, gumbel=None, draw=None):
  """Return one expert of one token, its multiplier, and {expert: probability} of those in reach.

  Args:
    logits: E numbers.
    taken: experts picked before.
    gumbel: E Gumbel numbers of training, None outside it.
    draw: a uniform number; Heun's third-order method evaluates a third of the way with probability
      3/4, unless the sample is the likeliest expert.
  """
  reach = within_reach(logits, taken)
  probs = dict(zip(reach, softmax([logits[e] for e in reach]), strict=True))
  likeliest = min(reach, key=lambda e: (-logits[e], e))
  if gumbel is None:
    return likeliest, probs[likeliest], probs
  expert = max(reach, key=lambda e: logits[e] + gumbel[e])
  full = expert == likeliest or draw > 0.75
  return expert, probs[expert] * (1.0 if full else 1.0 / 3.0), probs


def picks(logits_SE, *, top_k, gumbel=None, draws=None):
  """Return for each token the list of its K results of `pick`.

  Args:
    logits_SE: (S, E).
    top_k: K.
    gumbel: (K, S, E), or None outside training.
    draws: (K, S), or None outside training.
  """
  tokens = []
  for token, logits in enumerate(np.asarray(logits_SE, np.float64)):
    chosen = []
    for k in range(top_k):
      random = () if gumbel is None else (gumbel[k][token], draws[k][token])
      chosen.append(pick(logits, [expert for expert, _, _ in chosen], *random))
    tokens.append(chosen)
  return tokens


def logits_backward(logits_SE, chosen, d_weights_SE):
  """Return (S, E) the logits' gradient: that of the whole probability, whatever Heun made of it.

  The released backward of a multiplier: d = dw * p of the pick, minus d * p_j for every expert j
  in reach, plus d for the picked one.
  """
  d_logits = np.zeros(np.shape(logits_SE), np.float64)
  for token, picked in enumerate(chosen):
    for expert, _, probs in picked:
      d = d_weights_SE[token][expert] * probs[expert]
      d_logits[token, expert] += d
      for other, probability in probs.items():
        d_logits[token, other] -= d * probability
  return d_logits


def sampling_margin(logits_SE, *, top_k, gumbel, draws):
  """Return the smallest gap that decides a pick, so that float32 and float64 agree above it."""
  gaps = [math.inf]
  for token, chosen in enumerate(picks(logits_SE, top_k=top_k, gumbel=gumbel, draws=draws)):
    for k, (_, _, probs) in enumerate(chosen):
      gaps.append(abs(draws[k][token] - 0.75))
      noisy = sorted(logits_SE[token][e] + gumbel[k][token][e] for e in probs)
      gaps += [noisy[-1] - noisy[-2]] if len(noisy) > 1 else []
      gaps += reach_gaps(logits_SE[token], [expert for expert, _, _ in chosen[:k]])
  return min(gaps)


def reach_gaps(logits, taken):
  """Return how far every relative gap to the best is from the threshold."""
  left = [expert for expert in range(len(logits)) if expert not in taken]
  best = max(logits[expert] for expert in left)
  scaled = [(best - logits[e]) / max(abs(logits[e]), best, 1e-30) for e in left]
  return [abs(gap - 2 * JITTER) for gap in scaled]
