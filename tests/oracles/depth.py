"""Run a Mixture-of-Depths block for one sequence in float64 (arXiv 2404.02258 Eq. 1).

Letters: L length, D model width.
"""

import math

import numpy as np
from oracles import decoder


def best_tokens(logits_L, *, slots, token_mask):
  """Return the places of the `slots` real tokens with the largest logits; ties to the earlier."""
  real = [place for place in range(len(logits_L)) if token_mask[place]]
  return sorted(sorted(real, key=lambda place: -logits_L[place])[:slots])


def positive_tokens(logits_L, *, token_mask):
  """Return the places of the real tokens whose sigmoid exceeds a half."""
  return [place for place in range(len(logits_L)) if token_mask[place] and logits_L[place] > 0]


def block(x_LD, weights, *, capacity, score, train, token_mask, positions, segment_ids, **options):
  """Return (L, D): taken tokens get score * (block - identity) among themselves.

  Args:
    x_LD: (L, D).
    weights: as in `decoder.block`, and `depth_router` (D,).
    capacity: tokens taken in training.
    score: "linear" or "sigmoid".
    train: take the best of the sequence; otherwise every token with a positive logit.
    token_mask: (L,) True for a real token.
    positions: (L,) integers for the rotation.
    segment_ids: (L,) integers or None.
    **options: of `decoder.block`.
  """
  logits_L = x_LD @ weights["depth_router"]
  if train:
    taken = best_tokens(logits_L, slots=capacity, token_mask=token_mask)
  else:
    taken = positive_tokens(logits_L, token_mask=token_mask)
  y_LD = np.array(x_LD)
  if not taken:
    return y_LD
  part = x_LD[taken]
  out = decoder.block(
    part,
    weights,
    token_mask=np.ones(len(taken), bool),
    positions=np.asarray(positions)[taken],
    segment_ids=None if segment_ids is None else np.asarray(segment_ids)[taken],
    **options,
  )
  for row, place in enumerate(taken):
    weight = logits_L[place]
    if score == "sigmoid":
      weight = 1.0 / (1.0 + math.exp(-weight))
    y_LD[place] = x_LD[place] + weight * (out[row] - part[row])
  return y_LD


def entropy(logits_L, best, *, token_mask):
  """Return the sum over real tokens of -ln p for the best and -ln (1 - p) for others."""
  total = 0.0
  for place, logit in enumerate(logits_L):
    if token_mask[place]:
      probability = 1.0 / (1.0 + math.exp(-logit))
      total -= math.log(probability if place in best else 1.0 - probability)
  return total
