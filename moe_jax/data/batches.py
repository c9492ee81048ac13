"""Records side by side as the rows of a batch."""

from collections.abc import Sequence

import numpy as np

from moe_jax.data.packing import Record


def gather(source: Sequence[Record], places: Sequence[int]) -> Record:
  """Returns the records at these places, one a row: each field (len(places), L).

  At once where the source has a `gather` of its own, as prepared ones do; otherwise one by one.
  """
  if hasattr(source, "gather"):
    return source.gather(places)
  return stack([source[place] for place in places])


def stack(records: Sequence[Record]) -> Record:
  """Returns records of the same fields and shapes, at least one, as rows."""
  return {name: np.stack([record[name] for record in records]) for name in records[0]}
