"""The training data of a run, in the order that its config decides."""

import grain

from moe_jax.data.builders import PreparedData
from moe_jax.data.loader import train_iterator
from moe_jax.data.loader_state import StreamIdentity
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.placed import ALL_ROWS, RowBlock


def stream_of(config: ExperimentConfig, data: PreparedData) -> StreamIdentity:
  """Returns what decides the order of a run's training data."""
  return StreamIdentity(data.fingerprint, config.batch_size, config.seed)


def training_batches(
  config: ExperimentConfig, data: PreparedData, rows: RowBlock = ALL_ROWS
) -> grain.DatasetIterator:
  """Returns a block of rows of a run's batches from the first step on, see `train_iterator`."""
  return train_iterator(
    data.train,
    batch_size=config.batch_size,
    seed=config.seed,
    transform=config.pair_maker,
    process_index=rows.index,
    process_count=rows.count,
  )
