"""Rows of a table of choices in which every pair of values meets at least once."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence


def pairwise_rows(factors: Mapping[str, Sequence], allowed: Callable[[dict], bool]) -> list[dict]:
  """Returns rows of one value a factor that cover every pair which some allowed row has.

  Greedy with a fixed seed: for a pair not yet covered, the best of 40 random allowed rows that
  contain it. A pair that none of 40 draws completes is taken to be impossible.
  """
  generator = random.Random(0)
  missing = {
    ((a, x), (b, y))
    for a, b in itertools.combinations(factors, 2)
    for x in factors[a]
    for y in factors[b]
  }
  rows = []
  while missing:
    wanted = dict(min(missing, key=repr))
    draws = [
      {name: wanted.get(name, generator.choice(values)) for name, values in factors.items()}
      for _ in range(40)
    ]
    best = max(filter(allowed, draws), key=lambda row: len(missing & _pairs(row)), default=None)
    missing -= {tuple(wanted.items())} if best is None else _pairs(best)
    rows += [] if best is None else [best]
  return rows


def _pairs(row):
  return set(itertools.combinations(row.items(), 2))
