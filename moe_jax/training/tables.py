"""Tables of experts by token id, balanced by the training text (hash layers, arXiv 2106.04426)."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from moe_jax.data.packing import Record
from moe_jax.models import ModelConfig
from moe_jax.models.moe_stacks import moe_stacks
from moe_jax.moe.hashing import balanced_table
from moe_jax.training.state import TrainState


def fill_tables(state: TrainState, config: ModelConfig, records: Sequence[Record]) -> TrainState:
  """Gives every layer of `selection = table` a table balanced by the records' token counts.

  Done once, before the first step: the tables are part of every checkpoint, so nothing that reads
  the run needs its data. Each layer has a table of its own, a function of (hash_seed, layer) and
  the counts. Other routers keep their state.
  """
  if config.moe is None or config.moe.routing.selection != "table":
    return state
  routing, flat = config.moe.routing, dict(nnx.to_flat_state(state.router_state))
  counts = token_counts(records, config.vocab_size)
  for stack in moe_stacks(config):
    seeds = [(routing.hash_seed, layer) for layer in stack.layers]
    tables = [balanced_table(counts, routing.num_experts, seed) for seed in seeds]
    path = (*stack.path, "router", "table")
    place = flat[path].get_value().sharding
    flat[path] = flat[path].replace(jax.device_put(np.stack(tables), place))
  return dataclasses.replace(state, router_state=nnx.from_flat_state(flat.items()))


def token_counts(records: Sequence[Record], vocab_size: int) -> np.ndarray:
  """Returns (V,) int64, how often each token id is an input; padding left out."""
  counts = np.zeros(vocab_size, np.int64)
  for index in range(len(records)):
    record = records[index]
    counts += np.bincount(record["tokens"][record["segment_ids"] > 0], minlength=vocab_size)
  return counts
