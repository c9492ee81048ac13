"""Batches of packed records for training (endless, shuffled, resumable) and evaluation (in order).

`batch_size` is always the global one. Row r of global batch t is the same record on 1 process or 8:
process p of n reads rows p*b to (p+1)*b - 1, b = batch_size / n, of every batch, so a run can go on
with another number of processes. Nothing here starts a worker process: records are ready-made, and
reading them costs far less than a training step.
"""

from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from moe_jax.data.packing import Record
from moe_jax.errors import UserError

# Makes another record of one, with random numbers.
Transform = Callable[[Record, np.random.Generator], Record]

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
  none is seen twice in one epoch. `get_state()` is JSON-serialisable and depends on the number of
  batches only, so it is the same on all processes; `loader_state` guards its use.

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
  usable = steps_per_epoch(source, batch_size) * batch_size
  records = grain.MapDataset.source(source).seed(seed).shuffle()[:usable]
  if transform is not None:
    records = records.random_map(transform)
  return iter(
    records.batch(local_size, drop_remainder=True)[process_index::process_count]
    .repeat()
    .to_iter_dataset(_READ_AHEAD)
  )


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
  that weighs by `loss_mask` needs no special case.

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
  starts = range(0, len(source), batch_size)

  def record(index: int) -> Record:
    if transform is None:
      return source[index]
    return transform(source[index], np.random.default_rng(index))

  return (
    _rows(record, len(source), start + process_index * local_size, local_size) for start in starts
  )


def _rows(record: Callable[[int], Record], length: int, first: int, count: int) -> Record:
  """Stacks records first .. first + count - 1, zeros for those past the end."""
  filler = {name: np.zeros_like(values) for name, values in record(0).items()}
  indices = range(first, first + count)
  rows = [record(index) if index < length else filler for index in indices]
  return {name: np.stack([row[name] for row in rows]) for name in filler}


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
