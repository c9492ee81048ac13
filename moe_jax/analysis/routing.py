"""Count which tokens each expert took, and tell what an expert is unusually fond of.

Axis letters: V vocabulary, E experts, K choices per token. Counts are of assignments: a token that
goes to K experts counts K times, once for each.
"""

from collections.abc import Callable

import numpy as np

MIN_TOKEN_COUNT = 10  # a lift from fewer assignments to the expert is mostly chance


class ExpertTokenCounts:
  """Accumulates a (V, E) int64 table of how often each token went to each expert."""

  def __init__(self, num_experts: int, vocab_size: int):
    """Starts an empty table of V x E counts (8 V E bytes)."""
    self.counts = np.zeros((vocab_size, num_experts), np.int64)

  def add(self, token_ids: np.ndarray, expert_ids: np.ndarray, valid: np.ndarray) -> None:
    """Counts one batch.

    Args:
      token_ids: (...) integers in [0, V).
      expert_ids: (..., K) integers in [0, E), the experts of each token.
      valid: (...) bool, False for padding, or (..., K) bool, False also for a choice that was not
        made; ids where it is False are not read.

    Raises:
      ValueError: the shapes do not fit or a valid id is out of range.
    """
    token_ids, expert_ids = np.asarray(token_ids), np.asarray(expert_ids)
    valid = np.asarray(valid, bool)
    if expert_ids.shape[:-1] != token_ids.shape:
      raise ValueError(
        f"expert_ids {expert_ids.shape} must be token_ids {token_ids.shape} with an axis K added"
      )
    if valid.shape not in (token_ids.shape, expert_ids.shape):
      raise ValueError(
        f"valid {valid.shape} must have the shape of token_ids {token_ids.shape} "
        f"or of expert_ids {expert_ids.shape}"
      )
    if valid.ndim == token_ids.ndim:
      valid = valid[..., None]
    valid = np.broadcast_to(valid, expert_ids.shape)
    tokens = np.broadcast_to(token_ids[..., None], expert_ids.shape)[valid]
    self._count_pairs(tokens, expert_ids[valid])

  def _count_pairs(self, tokens: np.ndarray, experts: np.ndarray) -> None:
    vocab_size, num_experts = self.counts.shape
    _refuse_out_of_range("token_ids", tokens, vocab_size)
    _refuse_out_of_range("expert_ids", experts, num_experts)
    pairs, times = np.unique(
      tokens.astype(np.int64) * num_experts + experts.astype(np.int64), return_counts=True
    )
    self.counts.reshape(-1)[pairs] += times

  def shares(self) -> np.ndarray:
    """Returns (E,) float64, each expert's fraction of all assignments; zeros before any `add`."""
    return self.counts.sum(axis=0) / max(self.counts.sum(), 1)

  def lifts(self) -> np.ndarray:
    """Returns (V, E) float64 P(expert | token) / P(expert); 0 where either was never seen."""
    per_token = self.counts.sum(axis=1, keepdims=True)
    conditional = self.counts / np.maximum(per_token, 1)
    shares = self.shares()
    return np.divide(conditional, shares, out=np.zeros_like(conditional), where=shares > 0)

  def top_tokens(
    self, decode_token: Callable[[int], str], n: int, *, min_count: int = MIN_TOKEN_COUNT
  ) -> list[dict]:
    """Lists, for each expert, its share and the tokens that set it apart.

    Only tokens the expert took at least `min_count` times with a lift above 1 are listed, ordered
    by count x log(lift): the token's part in the mutual information of token and expert, which
    prefers neither the merely frequent (lift near 1) nor the merely rare. An expert without
    preferences has an empty list.

    Args:
      decode_token: token id -> the text to show.
      n: at most this many tokens for each expert.
      min_count: fewest assignments from which a lift is reported.

    Returns:
      One dict for each expert: `share`, and `top_tokens`, a list of `token`, `count`, `lift`.
    """
    lifts = self.lifts()
    return [
      {
        "share": float(share),
        "top_tokens": [
          {
            "token": decode_token(int(token)),
            "count": int(self.counts[token, expert]),
            "lift": float(lifts[token, expert]),
          }
          for token in _most_telling(self.counts[:, expert], lifts[:, expert], n, min_count)
        ],
      }
      for expert, share in enumerate(self.shares())
    ]


def _most_telling(counts: np.ndarray, lifts: np.ndarray, n: int, min_count: int) -> np.ndarray:
  """Returns up to `n` token ids by count x log(lift), highest first, ties by id."""
  candidates = np.flatnonzero((counts >= min_count) & (lifts > 1))
  information = counts[candidates] * np.log(lifts[candidates])
  return candidates[np.argsort(-information, kind="stable")[:n]]


def _refuse_out_of_range(name: str, ids: np.ndarray, size: int) -> None:
  outside = ids[(ids < 0) | (ids >= size)]
  if outside.size:
    raise ValueError(f"{name} holds {outside[0]}, expected 0 to {size - 1}")
