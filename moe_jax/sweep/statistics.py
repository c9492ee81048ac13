"""Differences over seeds: intervals, equivalence, and how many seeds would settle a question."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

_CONFIDENCE = 0.95
# Beyond this no one would train so many.
_MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean over seeds and what Student's t allows around it.

  Attributes:
    mean: of the values.
    half_width: of the two-sided interval; infinite for a single seed.
    n: seeds.
  """

  mean: float
  half_width: float
  n: int

  @property
  def low(self) -> float:
    """The lower end."""
    return self.mean - self.half_width

  @property
  def high(self) -> float:
    """The upper end."""
    return self.mean + self.half_width

  def __str__(self) -> str:
    """Says "1.2345 ± 0.0123"; small ones as "1.2e-06 ± 3.4e-07"."""
    size = max(abs(self.mean), self.half_width if self.n > 1 else 0)
    digits = ".4f" if size == 0 or size >= 1e-3 else ".1e"
    spread = f"± {self.half_width:{digits}}" if self.n > 1 else "(one seed)"
    return f"{self.mean:{digits}} {spread}"


def interval(values: Sequence[float], confidence: float = _CONFIDENCE) -> Interval:
  """Returns the two-sided Student interval of the mean of independent values.

  Of values that are all the same, as those of a deterministic quantity, it is a point.
  """
  values = np.asarray(values, np.float64)
  n = len(values)
  if n < 2:
    return Interval(float(values.mean()), math.inf, n)
  spread = float(values.std(ddof=1))
  return Interval(float(values.mean()), _half_width(spread, n, confidence), n)


def equivalence_interval(values: Sequence[float]) -> Interval:
  """Returns the 90 % interval: two one-sided tests at 5 % accept a margin that holds all of it."""
  return interval(values, 2 * _CONFIDENCE - 1)


def pooled_deviation(a: Sequence[float], b: Sequence[float]) -> float:
  """Returns the square root of the mean of two sample variances over seeds; 0 for single seeds."""
  if min(len(a), len(b)) < 2:
    return 0.0
  return math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2)


def seeds_to_reach(spread: float, half_width: float, confidence: float = _CONFIDENCE) -> int | None:
  """Returns the fewest seeds whose interval would be so narrow, the spread being what it is.

  Args:
    spread: sample standard deviation of the values.
    half_width: that is wished for, positive.
    confidence: of the two-sided interval.

  Returns:
    At least 2; None if a thousand would not do.
  """
  for n in range(2, _MOST_SEEDS + 1):
    if _half_width(spread, n, confidence) < half_width:
      return n
  return None


def _half_width(spread: float, n: int, confidence: float) -> float:
  return float(scipy.stats.t.ppf((1 + confidence) / 2, n - 1)) * spread / math.sqrt(n)
