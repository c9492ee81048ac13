"""Batches of packed records for training (endless, shuffled, resumable) and evaluation (in order).

`batch_size` is always the global one. Row r of global batch t is the same record on 1 process or 8:
process p of n reads rows p*b to (p+1)*b - 1, b = batch_size / n, of every batch, so a run can go on
with another number of processes. Nothing here starts a worker process: records are ready-made, and
reading them costs far less than a training step.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from moe_jax.data.batches import gather, stack
from moe_jax.data.mixture import Mixture, Shares
from moe_jax.data.packing import Record
from moe_jax.errors import UserError

# Makes another record of one, with random numbers.
Transform = Callable[[Record, np.random.Generator], Record]

# The fields that tell which places of a record are real, and which are predicted.
_REAL = ("segment_ids", "loss_mask")

# A few batches ahead on two threads hide the reading; grain's default (500 batches, 16 threads)
# would fill the memory and starve the training step on a small machine.
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def train_iterator(
  source: Sequence[Record],
  *,
  batch_size: int,
  seed: int,
  transform: Transform | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Returns an endless iterator over shuffled batches.

  Every epoch is a new permutation, a function of (seed, epoch) only. The last
  `len(source) % batch_size` records of each permutation are left out: other ones every epoch, and
  none is seen twice in one epoch. A `Mixture` has no such epochs: every part goes through its own,
  and the n-th row of training is of the part that the weights say.

  `get_state()` is JSON-serialisable and depends on the number of batches only, so it is the same on
  all processes; `loader_state` guards its use.

  Args:
    source: the records, each a dict of arrays of one shape.
    batch_size: rows in a global batch.
    seed: 0 to 2**32 - 1.
    transform: of every record; its random numbers are a function of seed, epoch and place.
    process_index: which rows to yield, from 0.
    process_count: number of processes that share a global batch.

  Returns:
    Dicts of (batch_size / process_count, L) int32 arrays.

  Raises:
    UserError: a size, seed or process that does not fit.
  """
  local_size = _local_size(batch_size, process_index, process_count)
  if not 0 <= seed < 2**32:
    raise UserError(f"the data seed is {seed}, but must be from 0 to {2**32 - 1}.")
  # Numbers go through the shuffle, and the records of a batch are read together at its end: what is
  # done for each record at each of grain's stations would cost more than reading it.
  places = _shuffled(source, seed, batch_size)
  if transform is None:
    batches = places.batch(
      local_size, drop_remainder=True, batch_fn=functools.partial(gather, source)
    )
  else:
    records = places.random_map(lambda place, rng: transform(source[place], rng))
    batches = records.batch(local_size, drop_remainder=True)
  batches = batches[process_index::process_count]
  if not isinstance(source, Mixture):
    batches = batches.repeat()
  return iter(batches.to_iter_dataset(_READ_AHEAD))


def places_in_batch(
  source: Sequence[Record], *, batch_size: int, seed: int, batch: int
) -> list[int]:
  """Returns the places in `source` of the records of a global batch, in the order of its rows.

  Args:
    source, batch_size, seed: see `train_iterator`.
    batch: which one, from 0.
  """
  places = _shuffled(source, seed, batch_size)
  if not isinstance(source, Mixture):
    places = places.repeat()
  return [int(places[batch * batch_size + row]) for row in range(batch_size)]


def _shuffled(source: Sequence[Record], seed: int, batch_size: int) -> grain.MapDataset:
  """Returns the places of one epoch of full batches; of a mixture, an endless sequence."""
  usable = steps_per_epoch(source, batch_size) * batch_size
  if not isinstance(source, Mixture):
    return grain.MapDataset.range(len(source)).seed(seed).shuffle()[:usable]
  # Parts of one length are not to go through their records in one order.
  ends = itertools.accumulate(map(len, source.parts))
  parts = [
    grain.MapDataset.range(end - len(part), end)
    .seed((seed + number * 0x9E3779B1) % 2**32)
    .shuffle()
    .repeat()
    for number, (part, end) in enumerate(zip(source.parts, ends, strict=True))
  ]
  mixed = grain.MapDataset.select_from_datasets(parts, Shares(source.weights))
  return mixed.seed(seed)


def steps_per_epoch(source: Sequence[Record], batch_size: int) -> int:
  """Returns the number of full batches in one epoch; raises UserError if there is none."""
  if batch_size > len(source):
    raise UserError(
      f"batch_size is {batch_size}, but the data set has only {len(source)} records; "
      f"choose at most {len(source)}."
    )
  return len(source) // batch_size


def eval_batches(
  source: Sequence[Record],
  batch_size: int,
  *,
  transform: Transform | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Record]:
  """Yields every record exactly once, in order, in batches of one shape.

  The last batch is filled up with records of zeros (segment_ids 0, loss_mask 0), so an evaluation
  that weighs by `loss_mask` needs no special case. Where records have images, only these two are 0:
  a model that reads images looks for one in every row.

  Args:
    source: the records.
    batch_size: rows in a global batch.
    transform: of every record; its random numbers are a function of the record's place alone.
    process_index: which rows to yield, from 0.
    process_count: number of processes that share a global batch.

  Returns:
    Dicts of (batch_size / process_count, L) int32 arrays, as many on every process.

  Raises:
    UserError: batch_size does not divide over the processes.
  """
  local_size = _local_size(batch_size, process_index, process_count)
  first = process_index * local_size

  def read(places: Sequence[int]) -> Record:
    if transform is None:
      return gather(source, places)
    return stack([transform(source[place], np.random.default_rng(place)) for place in places])

  return (
    _rows(read, len(source), start + first, local_size)
    for start in range(0, len(source), batch_size)
  )


def _rows(read: Callable[[Sequence[int]], Record], length: int, first: int, count: int) -> Record:
  """Returns records first .. first + count - 1, padding for those past the end."""
  real = min(max(length - first, 0), count)
  rows = read([first + row if row < real else 0 for row in range(count)])
  for name in _REAL if "pixel_values" in rows else rows:
    rows[name][real:] = 0
  return rows


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
  """Returns the rows of a batch that one process reads."""
  if not 0 <= process_index < process_count:
    raise UserError(f"process_index is {process_index}, but process_count is {process_count}.")
  if batch_size < 1 or batch_size % process_count:
    nearest = max(1, round(batch_size / process_count)) * process_count
    raise UserError(
      f"batch_size is {batch_size}, but must be a positive multiple of process_count "
      f"{process_count}; the nearest is {nearest}."
    )
  return batch_size // process_count
