"""Programs and batches of a run on a mesh."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.models import ModelConfig
from moe_jax.moe.expert_parallel import check_groups
from moe_jax.sharding.context import constrain, current_layout, use_layout
from moe_jax.sharding.layout import Axes, Layout
from moe_jax.sharding.pipeline import check_stages, num_stages
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import abstract_state

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class RowBlock:
  """One of the equal, consecutive parts of a batch's rows that processes read.

  Attributes:
    index: which one, from 0.
    count: how many there are.
  """

  index: int = 0
  count: int = 1


ALL_ROWS = RowBlock()


def own_rows(
  layout: Layout | None, batch_size: int, devices: Collection[jax.Device] | None = None
) -> RowBlock:
  """Returns the smallest block that holds all rows which the devices of a process work on.

  Processes that share rows, as where one tensor is split over several of them, read the same block;
  one whose devices hold scattered rows reads more than it needs.

  Args:
    layout: where batches are; None = on one device.
    batch_size: rows of one.
    devices: of the process; those of this one if None.

  Raises:
    UserError: a batch that the mesh does not divide.
  """
  if layout is None:
    return ALL_ROWS
  sharding = layout.sharding(("batch",), (batch_size,), "a batch")
  places = sharding.devices_indices_map((batch_size,))
  devices = jax.local_devices() if devices is None else devices
  ranges = [places[each][0].indices(batch_size) for each in devices if each in places]
  first, last = min(start for start, *_ in ranges), max(stop for _, stop, _ in ranges) - 1
  sizes = (n for n in range(last - first + 1, batch_size + 1) if batch_size % n == 0)
  size = next(n for n in sizes if first // n == last // n)
  return RowBlock(first // size, batch_size // size)


def compile_for(layout: Layout | None, function: Callable, **options: Any) -> Callable:
  """Returns `jax.jit` of a function whose layers see the layout while they are traced."""

  @functools.wraps(function)
  def traced(*args):
    with use_layout(layout):
      return function(*args)

  return jax.jit(traced, compiler_options=_compiler_options(layout), **options)


def _compiler_options(layout: Layout | None) -> dict[str, str] | None:
  """On CPU, attention and other chains of operations by XLA itself and not by YNNPACK.

  A training step of a small model takes 1.4 times as long with that library's fusions, on one core
  and on two.
  """
  platform = jax.default_backend() if layout is None else layout.platform
  return {"xla_cpu_experimental_ynn_fusion_type": ""} if platform == "cpu" else None


def place_batches(
  batches: Iterator[Mapping[str, np.ndarray]], layout: Layout | None, rows: RowBlock = ALL_ROWS
) -> Iterator[Mapping[str, Any]]:
  """Yields batches where the layout wants them; as they are without one."""
  for batch in batches:
    yield batch if layout is None else place_batch(batch, layout, rows)


def place_batch(
  batch: Mapping[str, np.ndarray], layout: Layout, rows: RowBlock = ALL_ROWS
) -> Batch:
  """Returns a batch split over the mesh.

  Args:
    batch: of each field the rows that this process has read.
    layout: where they are to be.
    rows: which rows those are.

  Raises:
    UserError: a batch or length that the mesh does not divide.
  """
  return {name: _place(name, a, layout, rows) for name, a in batch.items()}


def _place(name: str, own: np.ndarray, layout: Layout, rows: RowBlock) -> jax.Array:
  shape = (own.shape[0] * rows.count, *own.shape[1:])
  before = own.shape[0] * rows.index

  def part(index):
    start, stop, _ = index[0].indices(shape[0])
    return own[(slice(start - before, stop - before), *index[1:])]

  sharding = layout.sharding(batch_axes(name), shape, name)
  return jax.make_array_from_callback(shape, sharding, part)


def check_run_fits(config: ExperimentConfig, layout: Layout) -> None:
  """Refuses a run that the mesh does not divide, before anything of it is made.

  Raises:
    UserError: a parameter, a microbatch or its sequences, see `Layout.spec`; segments that the
      stages of a pipeline cannot share.
  """
  _check_stages(config.model, num_stages(layout))
  optimizer = make_optimizer(config.optimizer, config.steps)
  abstract_state(config.model, optimizer, config.repair, layout, config.balance_placement)
  if config.balance_placement.every:
    config.balance_placement.packed_to(layout.parts("expert"), config.model.moe)
  microbatch = config.batch_size // config.accumulation_steps
  sizes = {"a microbatch": microbatch, "an evaluation batch": config.eval.batch_size or microbatch}
  for what, rows in sizes.items():
    shape = rows, config.data.sequence_length
    layout.spec(("batch", "length"), shape, what)
    if config.model.moe is not None:
      check_groups(shape, config.model.moe.routing, config.model.moe.dispatch, layout)


def _check_stages(model: ModelConfig, stages: int) -> None:
  """Refuses stacks of which some stages would get more layers than others."""
  stacks = {
    "": model,
    "the encoder's ": model.encoder_stack(),
    "the vision tower's ": model.vision_stack(),
  }
  for whose, stack in stacks.items():
    for index, segment in enumerate([] if stack is None else stack.parsed_segments()):
      check_stages(f"{whose}segment {index}", segment.repeats, stages)
  if model.mtp_depth and stages > 1:
    raise UserError(
      f"mtp_depth = {model.mtp_depth} is refused with stage = {stages}: each depth is one block,"
      " which no stages can share; use stage = 1, or mtp_depth = 0"
    )


def on_one_device(model: nnx.State, layout: Layout | None) -> nnx.State:
  """Returns a model's variables whole, on the first device of this process.

  Every device holds them whole for a moment. All processes must call this.
  """
  if layout is None:
    return model
  whole = jax.jit(lambda tree: tree, out_shardings=layout.replicated)(model)
  return jax.tree.map(lambda a: a.addressable_data(0), whole)


def batch_axes(name: str) -> Axes:
  """Returns the logical axes of a field of a batch."""
  return ("batch", None, None, None) if name == "pixel_values" else ("batch", "length")


def constrain_batch(pieces: Batch) -> Batch:
  """Keeps each microbatch of (M, B / M, ...) arrays split over the mesh as the batch is."""
  return {name: constrain(a, (None, *batch_axes(name))) for name, a in pieces.items()}


def like_parameters(grads: nnx.State) -> nnx.State:
  """Keeps gradients where their parameters live, so that they are summed by reduce-scatter."""
  layout = current_layout()
  return grads if layout is None else jax.lax.with_sharding_constraint(grads, layout.of_tree(grads))
