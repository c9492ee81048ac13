"""How tests compare numbers, and inputs whose routing no rounding can change."""

import numpy as np

# Float32 rounds probabilities at 1e-7; a choice decided by 1e-4 is the same in float32 and float64.
ROUTING_MARGIN = 1e-4


def relative_error(actual, expected, floor=1e-6) -> float:
  """Returns max |actual - expected| / max(max |expected|, floor) of one tensor; inf for a NaN.

  Relative to the tensor's largest entry: a small entry beside large ones is rounded at their
  scale.
  """
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape}"
  if actual.size == 0:
    return 0.0
  difference = np.max(np.abs(actual - expected))
  return float(np.nan_to_num(difference / max(np.max(np.abs(expected)), floor), nan=np.inf))


def softmax(logits):
  """Returns the float64 softmax over the last axis."""
  shifted = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
  return shifted / np.sum(shifted, axis=-1, keepdims=True)


def routing_margin(logits) -> float:
  """Returns the smallest gap that decides a routing of logits (..., E).

  Between any two probabilities of a token, which decide its choices, and between the largest
  probabilities of any two tokens, which decide who is served first under `max_score`.
  """
  probs = softmax(np.asarray(logits, np.float64)).reshape(-1, np.shape(logits)[-1])
  within = np.diff(np.sort(probs, axis=1), axis=1)
  between = np.diff(np.sort(probs.max(axis=1)))
  # One expert alone has the probability 1 for every token: nothing is decided.
  gaps = [*within.ravel(), *(between if probs.shape[1] > 1 else [])]
  return min(gaps, default=np.inf)


def draw_logits(seed: int, shape: tuple[int, ...]):
  """Returns normal float32 logits (..., E) with routing margins above ROUTING_MARGIN."""
  generator = np.random.default_rng(seed)
  tokens = []
  while len(tokens) < np.prod(shape[:-1]):
    token = generator.normal(size=(1, shape[-1])).astype(np.float32)
    if routing_margin([*tokens, token[0]]) > ROUTING_MARGIN:
      tokens.append(token[0])
  return np.array(tokens).reshape(shape)
