"""Several sets of records as one, by weight."""

import bisect
import dataclasses
import fractions
import functools
import itertools
import math
import sys
from collections.abc import Sequence

import grain
import numpy as np

from moe_jax.data.batches import gather
from moe_jax.data.packing import Record


@dataclasses.dataclass(frozen=True)
class Mixture(Sequence[Record]):
  """Sets of records to train on, each drawn from in proportion to its weight.

  As a sequence it is the sets one after the other. Which set the n-th record of training comes
  from is a function of the weights and n alone; see `Shares`. Each set goes through epochs of its
  own.

  Attributes:
    parts: the sets.
    weights: positive, of any sum.
  """

  parts: tuple[Sequence[Record], ...]
  weights: tuple[float, ...]

  def __len__(self) -> int:
    return sum(map(len, self.parts))

  def __getitem__(self, index: int) -> Record:
    part, place = self._find(range(len(self))[index])
    return self.parts[part][place]

  def gather(self, places: Sequence[int]) -> Record:
    """Returns the records at these places as rows, each field (len(places), L)."""
    found = [(*self._find(place), row) for row, place in enumerate(places)]
    parts, rows = [], []
    for part in {part for part, _, _ in found}:
      own = [(place, row) for of, place, row in found if of == part]
      parts.append(gather(self.parts[part], [place for place, _ in own]))
      rows += [row for _, row in own]
    order = np.argsort(rows)
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}

  def _find(self, index: int) -> tuple[int, int]:
    """Returns which set holds a record, and its place in that set."""
    part = bisect.bisect_right(self._ends, index)
    return part, index - (self._ends[part] - len(self.parts[part]))

  @functools.cached_property
  def _ends(self) -> list[int]:
    return list(itertools.accumulate(map(len, self.parts)))


class Shares(grain.transforms.DatasetSelectionMap):
  """Tells which set the n-th record comes from, and the how-manieth of that set it is.

  After any number of records each set has had its share of them, give or take a record a set.
  Unlike `grain.MapDataset.mix`, which rounds weights to a hundredth of the smallest, it counts in
  whole numbers, so that shares hold for ever.
  """

  def __init__(self, weights: Sequence[float]):
    # As they are written: 0.1 is a tenth, and not the float next to it.
    exact = [fractions.Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    self._weights = [int(weight * scale) for weight in exact]

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[int, int]:
    before, after, rest = index, index + 1, sum(self._weights)
    for part, weight in enumerate(self._weights):
      # Of the records so far, those that later sets have had.
      later_before, later_after = (n * (rest - weight) // rest for n in (before, after))
      own = after - later_after
      if own > before - later_before:
        return part, own - 1
      before, after, rest = later_before, later_after, rest - weight
    raise IndexError(index)
