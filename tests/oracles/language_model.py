"""Run the pieces of a decoder for one sequence, in float64 with plain loops.

Letters: L length, D model width, H query heads, N key/value heads, A width of one head, V
vocabulary.
"""

import math

import numpy as np
from oracles import losses, moe, routing


def rms_norm(x_LD, scale_D, *, epsilon=1e-6):
  """Return x / sqrt(mean(x^2) + epsilon) * scale for each token (arXiv 1910.07467)."""
  y_LD = np.zeros(np.shape(x_LD), np.float64)
  for position, x_D in enumerate(np.asarray(x_LD, np.float64)):
    y_LD[position] = x_D / math.sqrt(sum(x_D * x_D) / len(x_D) + epsilon) * scale_D
  return y_LD


def rotary(x_LHA, positions, *, base=10_000.0):
  """Rotate each pair of a head's channels by an angle that grows with the position.

  Channel i of the first half is paired with channel i of the second half, and turned by
  position * base^(-2i / A) (arXiv 2104.09864, in the half-split order of GPT-NeoX and Llama).

  Args:
    x_LHA: (L, H, A) queries or keys, A even.
    positions: (L,) integers.
    base: period scale.
  """
  x_LHA = np.asarray(x_LHA, np.float64)
  half = x_LHA.shape[-1] // 2
  y_LHA = np.zeros_like(x_LHA)
  for index, position in enumerate(positions):
    for i in range(half):
      angle = position * base ** (-2.0 * i / (2 * half))
      first, second = x_LHA[index, :, i], x_LHA[index, :, i + half]
      y_LHA[index, :, i] = first * math.cos(angle) - second * math.sin(angle)
      y_LHA[index, :, i + half] = second * math.cos(angle) + first * math.sin(angle)
  return y_LHA


def visible_keys(query, *, segment_ids=None, token_mask=None):
  """Return the positions that `query` attends to: not later, same segment, real tokens only."""
  return [
    key
    for key in range(query + 1)
    if (segment_ids is None or segment_ids[key] == segment_ids[query])
    and (token_mask is None or token_mask[key])
  ]


def attention(q_LHA, k_LNA, v_LNA, *, segment_ids=None, token_mask=None):
  """Return (L, H, A) causal softmax attention with grouped queries.

  Query heads are split in order over the key/value heads: head h reads key/value head
  h // (H / N). Scores are scaled by 1 / sqrt(A). A position that sees no key gives zeros.

  Args:
    q_LHA: (L, H, A) queries.
    k_LNA: (L, N, A) keys; N divides H.
    v_LNA: (L, N, A) values.
    segment_ids: (L,) integers; positions of different segments do not see each other.
    token_mask: (L,) True for a real token; padding is no key.
  """
  length, num_heads, width = q_LHA.shape
  heads_per_kv = num_heads // k_LNA.shape[1]
  y_LHA = np.zeros((length, num_heads, width))
  for query in range(length):
    keys = visible_keys(query, segment_ids=segment_ids, token_mask=token_mask)
    if not keys:
      continue
    for head in range(num_heads):
      kv = head // heads_per_kv
      scores = [q_LHA[query, head] @ k_LNA[key, kv] / math.sqrt(width) for key in keys]
      for key, weight in zip(keys, routing.softmax(scores), strict=True):
        y_LHA[query, head] += weight * v_LNA[key, kv]
  return y_LHA


def positions_of(segment_ids):
  """Return (L,) positions that start at 0 where a new segment starts."""
  positions = []
  for index, segment in enumerate(segment_ids):
    starts = index == 0 or segment != segment_ids[index - 1]
    positions.append(0 if starts else positions[-1] + 1)
  return np.array(positions)


def attention_layer(x_LD, weights, *, positions, base=10_000.0, segment_ids=None, token_mask=None):
  """Return (L, D): project, rotate queries and keys, attend, project back. No biases.

  Args:
    x_LD: (L, D) normed input.
    weights: {"query": (D, H, A), "key": (D, N, A), "value": (D, N, A), "out": (H, A, D)}.
    positions: (L,) integers for the rotation.
    base: as in `rotary`.
    segment_ids: as in `attention`.
    token_mask: as in `attention`.
  """
  q_LHA = rotary(np.einsum("LD,DHA->LHA", x_LD, weights["query"]), positions, base=base)
  k_LNA = rotary(np.einsum("LD,DNA->LNA", x_LD, weights["key"]), positions, base=base)
  v_LNA = np.einsum("LD,DNA->LNA", x_LD, weights["value"])
  y_LHA = attention(q_LHA, k_LNA, v_LNA, segment_ids=segment_ids, token_mask=token_mask)
  return np.einsum("LHA,HAD->LD", y_LHA, weights["out"])


def dense_ffn(x_LD, expert, activation):
  """Return (L, D): one feed-forward network, as in `moe.ffn`, on every token."""
  return np.array([moe.ffn(x_D, expert, activation) for x_D in x_LD])


def cross_entropy(logits_LV, targets, *, token_mask=None):
  """Return the mean over real tokens of logsumexp(logits) - logits[target], in nats."""
  values = [
    losses.log_sum_exp(logits_V) - logits_V[target]
    for position, (logits_V, target) in enumerate(zip(logits_LV, targets, strict=True))
    if token_mask is None or token_mask[position]
  ]
  return sum(values) / len(values) if values else 0.0
