"""Random routings for the tests: distinct experts a token, padding, choices that were not made."""

import numpy as np

B, L, E, K = 4, 9, 8, 3


def draw_routing(seed=0, *, shape=(B, L), num_experts=E, top_k=K):
  """Returns expert (..., K), asked (..., K), token_mask (...); ids of padding are out of range."""
  rng = np.random.default_rng(seed)
  # Skewed, so that no metric is near its value at uniform load.
  scores = rng.normal(size=(*shape, num_experts)) + np.linspace(0, 1.5, num_experts)
  expert = np.argsort(-scores, axis=-1)[..., :top_k].astype(np.int32)
  mask = rng.random(shape) < 0.8
  asked = np.repeat(mask[..., None], top_k, axis=-1)
  asked[..., -1] &= rng.random(shape) < 0.8
  expert = np.where(mask[..., None], expert, -7).astype(np.int32)
  return expert, asked, mask


def draw_probabilities(seed=0, *, shape=(B, L), num_experts=E):
  """Returns float32 logits and their softmax, both (..., E)."""
  logits = 2.0 * np.random.default_rng(seed).normal(size=(*shape, num_experts))
  probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  return logits.astype(np.float32), probs.astype(np.float32)
