"""The order of records is what it has always been: a saved place in it means nothing in another.

The numbers are those that came out when the format of data sets was given its version; they may
change with that version only, or where a run that goes on is told in one sentence that it cannot.
"""

import itertools

import numpy as np
import pytest

from moe_jax.data.loader import train_iterator
from moe_jax.data.mixture import Mixture


def _numbered(first, count):
  return [{"tokens": np.full(2, first + i, np.int32)} for i in range(count)]


ALONE = _numbered(0, 11)
MIXED = Mixture((_numbered(0, 5), _numbered(100, 13), _numbered(200, 7)), (0.1, 0.6, 0.3))
# Batches of 4 from seed 7, across the ends of epochs.
ORDER = {
  "alone": (ALONE, [7, 9, 0, 8, 4, 2, 5, 6, 6, 0, 4, 2, 7, 9, 1, 10, 2, 8, 6, 1, 10, 5, 7, 4]),
  "mixed": (
    MIXED,
    [2, 102, 100, 203, 107, 105, 202, 104, 109, 200, 1, 108]
    + [106, 206, 111, 103, 204, 110, 101, 201, 0, 112, 111, 205],
  ),
}
# Of a transform that draws two numbers below 1000 for each record.
DRAWN = {
  "alone": (
    ALONE,
    [[116, 784], [110, 313], [170, 311], [307, 774], [230, 593], [77, 168], [245, 33], [105, 60]],
  ),
  "mixed": (
    MIXED,
    [[888, 407], [263, 994], [606, 581], [241, 847], [112, 268], [77, 991], [667, 611], [272, 819]],
  ),
}


def _batches(source, count, **arguments):
  iterator = train_iterator(source, batch_size=4, seed=7, **arguments)
  rows = np.concatenate([batch["tokens"] for batch in itertools.islice(iterator, count)])
  assert iterator.get_state() == {"next_index": count}
  return rows


@pytest.mark.parametrize("name", ORDER)
def test_records_come_in_the_order_of_old(name):
  source, expected = ORDER[name]
  assert _batches(source, 6)[:, 0].tolist() == expected


@pytest.mark.parametrize("name", DRAWN)
def test_transforms_draw_the_numbers_of_old(name):
  source, expected = DRAWN[name]

  def draw(record, rng):
    return {"tokens": record["tokens"] * 1000 + rng.integers(1000, size=2).astype(np.int32)}

  drawn = _batches(source, 2, transform=draw)
  assert (drawn % 1000).tolist() == expected
  assert (drawn[:, 0] // 1000).tolist() == ORDER[name][1][:8]
