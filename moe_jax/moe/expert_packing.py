"""Packing of loads: replicas for the heaviest experts, and equal numbers of items for every pack.

The two greedy steps of DeepSeek's expert-parallelism load balancer (github.com/deepseek-ai/EPLB,
arXiv 2412.19437 section 3.4), as NumPy on the host. Arithmetic is float32 as in the original, so
that near-ties fall alike.
"""

import numpy as np


def replicate_experts(load: np.ndarray, num_physical: int) -> tuple[np.ndarray, np.ndarray]:
  """Gives replicas one by one to the expert whose replicas each bear the most.

  Args:
    load: (X, E) loads, X rows on their own.
    num_physical: P, at least E.

  Returns:
    (logical, count): (X, P) int32, the expert of each physical one, first 0..E-1 and then the
    further replicas in the order they were given; (X, E) int32, the replicas of each expert.
  """
  load = np.asarray(load, np.float32)
  rows, num_experts = load.shape
  every = np.arange(rows)
  logical = np.tile(np.arange(num_physical, dtype=np.int32), (rows, 1))
  count = np.ones((rows, num_experts), np.int32)
  for replica in range(num_experts, num_physical):
    heaviest = np.argmax(load / count.astype(np.float32), axis=-1)
    logical[:, replica] = heaviest
    count[every, heaviest] += 1
  return logical, count


def pack_evenly(weight: np.ndarray, num_packs: int, base: np.ndarray | None = None) -> np.ndarray:
  """Packs n items into packs of n / num_packs each, heaviest first into the lightest with room.

  Args:
    weight: (X, n) weights, X rows on their own.
    num_packs: divides n.
    base: (X, num_packs), what packs carry already; nothing by default.

  Returns:
    (X, n) int32: the items in the order of packs; the first n / num_packs are those of pack 0, in
    the order they came in.
  """
  weight = np.asarray(weight, np.float32)
  rows, items = weight.shape
  room = items // num_packs
  if room == 1 and base is None:
    return np.tile(np.arange(items, dtype=np.int32), (rows, 1))
  heaviest_first = np.argsort(-weight, axis=-1, kind="stable")
  base = np.zeros((rows, num_packs), np.float32) if base is None else base
  triples = zip(weight, heaviest_first, base, strict=True)
  return np.stack([_packed(row, order, carried) for row, order, carried in triples])


def _packed(weight: np.ndarray, order: np.ndarray, base: np.ndarray) -> np.ndarray:
  """Returns (n,) int32, the items of one row in the order of packs."""
  num_packs, room = base.size, weight.size // base.size
  packs = np.empty((num_packs, room), np.int32)
  carried, held = base.astype(np.float32), np.zeros(num_packs, np.int32)
  for item in order:
    lightest = np.argmin(np.where(held < room, carried, np.inf))
    packs[lightest, held[lightest]] = item
    carried[lightest] += weight[item]
    held[lightest] += 1
  return packs.reshape(-1)
