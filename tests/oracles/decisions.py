"""Rank and compare numbers, and remember how narrow the narrowest decision was.

Float32 code decides like float64 loops only where no decision hangs on a rounding. Every decision
of the oracles that reads a computed number goes through here, so a test can ask how far its input
stands from the nearest edge. An exact tie is no narrow decision: equal inputs give equal numbers
in both precisions, and the rule for ties decides.
"""

import contextlib
import itertools
import math

_WATCHERS = []


@contextlib.contextmanager
def watched():
  """Collect the size of every decision taken inside the context, in the list that it yields."""
  gaps = []
  _WATCHERS.append(gaps)
  try:
    yield gaps
  finally:
    _WATCHERS.remove(gaps)


def best_first(values):
  """Return the indices of `values` by size, largest first; ties go to the lower index."""
  order = sorted(range(len(values)), key=lambda index: (-values[index], index))
  for above, below in itertools.pairwise(order):
    _note(values[above], values[below])
  return order


def exceeds(value, threshold):
  """Tell whether value > threshold."""
  _note(value, threshold)
  return value > threshold


def _note(one, other):
  if one == other or math.isinf(one) or math.isinf(other):
    return
  for gaps in _WATCHERS:
    gaps.append(abs(one - other))
