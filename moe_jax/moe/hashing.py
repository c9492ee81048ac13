"""Hash tables for routing by token id, balanced by frequency (hash layers, arXiv 2106.04426)."""

import heapq
from collections.abc import Sequence

import numpy as np

from moe_jax.errors import UserError


def balanced_table(
  counts: np.ndarray, num_experts: int, seed: int | Sequence[int] = 0
) -> np.ndarray:
  """Assigns every token id to an expert so that experts see about equally many tokens.

  The balanced hash of the paper's section 3: ids in order of falling frequency, each to the expert
  that has the fewest tokens so far. The fullest expert exceeds the emptiest by at most the count of
  one id: a frequent word cannot be shared out. Ids of equal count go in a random order, ties
  between experts to a random one, so that seeds give different tables for different layers.

  Args:
    counts: (V,) non-negative counts of each token id in the training text.
    num_experts: E.
    seed: of the order among equals; several numbers make one seed, such as a run's and a layer's.

  Returns:
    (V,) int32 expert ids. `table[tokens]` is what `selection = table` takes as token ids.

  Raises:
    UserError: counts that are no counts, or no expert.
  """
  counts = np.asarray(counts)
  _check(counts, num_experts)
  # Unsigned integers have no negative to sort by.
  counts = counts.astype(np.float64)
  generator = np.random.default_rng(seed)
  shuffled = generator.permutation(len(counts))
  by_frequency = shuffled[np.argsort(-counts[shuffled], kind="stable")]
  # (tokens so far, ids so far, random rank, expert): ids that never occur spread evenly too.
  rank = generator.permutation(num_experts)
  loads = [(0.0, 0, int(rank[expert]), expert) for expert in range(num_experts)]
  heapq.heapify(loads)
  table = np.empty(len(counts), np.int32)
  for token in by_frequency:
    load, ids, order, expert = loads[0]
    table[token] = expert
    heapq.heapreplace(loads, (load + counts[token], ids + 1, order, expert))
  return table


def _check(counts: np.ndarray, num_experts: int) -> None:
  if counts.ndim != 1 or counts.dtype.kind not in "iuf":
    raise UserError(
      f"counts have shape {counts.shape} and dtype {counts.dtype}; expected one number a token id"
    )
  bad = ~np.isfinite(counts) | (counts < 0)
  if bad.any():
    raise UserError(
      f"counts[{np.argmax(bad)}] = {counts[bad][0]} is refused: it must be 0 or greater"
    )
  if num_experts < 1:
    raise UserError(f"num_experts = {num_experts} is refused: it must be at least 1")
