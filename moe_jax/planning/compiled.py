"""The real training step, compiled for a pod that is not there."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.errors import UserError
from moe_jax.planning.hlo import Program, parse_program
from moe_jax.planning.pod import PodRun
from moe_jax.planning.topology import Topology, smallest_slice
from moe_jax.sharding.layout import Layout, make_layout
from moe_jax.sharding.rules import rules_of
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.placed import batch_axes
from moe_jax.training.state import TrainState, abstract_state
from moe_jax.training.step import make_train_step

_FIELDS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
_SOURCE_FIELDS = ("source_tokens", "source_segment_ids")
# The compiler refuses while it assigns buffers, or before where temporaries alone are too large.
_USED = re.compile(
  r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"
  r"|temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"
)
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device.

  Attributes:
    parameters: float32 weights, router state included.
    optimizer: its state.
    activations: the peak without these: gradients, activations and whatever the compiler keeps.
    peak: the most at any time, as the compiler's assignment of buffers has it.
    capacity: what the chip has.
  """

  parameters: float
  optimizer: float
  activations: float
  peak: float
  capacity: float


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """A training step compiled for a topology.

  Attributes:
    program: what one device runs.
    mesh: of all devices.
    memory: see `Memory`.
    seconds: wall time of lowering and compiling.
  """

  program: Program
  mesh: Mesh
  memory: Memory
  seconds: float


def compile_step(run: PodRun, topology: Topology) -> CompiledStep:
  """Compiles a run's training step: all layers, forward, backward and optimiser.

  Raises:
    UserError: no libtpu, a mesh that the model does not divide, or a step that does not fit into
      the chip's memory.
  """
  started = time.monotonic()
  devices = topology.devices()
  layout = make_layout(run.experiment.sharding, devices)
  if layout is None:
    raise UserError(
      f"{topology.describe()} has several devices and the layout asks for one: set for example"
      " config.sharding.fsdp = -1"
    )
  config = run.experiment
  optimizer = make_optimizer(config.optimizer, config.steps)
  state = abstract_state(config.model, optimizer, config.repair, layout, config.balance_placement)
  lowered = make_train_step(config, optimizer, layout).lower(state, abstract_batch(run, layout))
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    raise _refusal(error, run, state, topology) from error
  stats = compiled.memory_analysis()
  memory = _memory(state, stats.peak_memory_in_bytes, topology)
  program = parse_program(compiled.as_text())
  return CompiledStep(program, layout.mesh, memory, time.monotonic() - started)


def abstract_batch(run: PodRun, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes and places of a step's batch.

  Raises:
    UserError: a batch, microbatch or length that the mesh does not divide.
  """
  pairs = run.experiment.model.encoder is not None
  shape = (run.experiment.batch_size, run.sequence_length)
  rows = run.experiment.batch_size // run.experiment.accumulation_steps
  layout.spec(("batch", "length"), (rows, run.sequence_length), "a microbatch")
  return {
    name: jax.ShapeDtypeStruct(
      shape, jnp.int32, sharding=layout.sharding(batch_axes(name), shape, name)
    )
    for name in _FIELDS + (_SOURCE_FIELDS if pairs else ())
  }


def bytes_per_device(tree: Any) -> float:
  """Returns the bytes of a tree of abstract arrays with shardings that one device holds."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _memory(state: TrainState, peak: float, topology: Topology) -> Memory:
  parameters = bytes_per_device((state.params, state.router_state))
  optimizer = bytes_per_device(state.opt_state)
  rest = peak - parameters - optimizer
  return Memory(parameters, optimizer, rest, peak, topology.chip.hbm_bytes)


def _refusal(error: Exception, run: PodRun, state: TrainState, topology: Topology) -> UserError:
  """Says by how much a step does not fit, and what would."""
  text = " ".join(str(error).split())
  found = _USED.search(text)
  if found is None:
    raise error
  held, temporaries = bytes_per_device(state), found[1] is None
  need, need_unit, have, have_unit = found.groups()[4:] if temporaries else found.groups()[:4]
  need, have = float(need) * _UNITS[need_unit], float(have) * _UNITS[have_unit]
  need += held if temporaries else 0.0
  rest = need - held
  copied = "embed" not in rules_of(run.experiment.sharding.layout)
  if copied and (rest < have or held >= have):
    whole = "fsdp" if run.experiment.model.moe is None else "ep_fsdp"
    advice = f"--layout={whole}, which splits every parameter over the chips"
  elif rest < have:
    # State shrinks with the number of chips; a device's part of the batch is as large as before.
    chips = topology.num_chips * held / (have - rest)
    nearest = smallest_slice(topology.chip, chips / topology.num_slices)
    advice = f"about {math.ceil(chips):,} chips"
    if nearest is not None:
      advice = dataclasses.replace(nearest, num_slices=topology.num_slices).describe()
  else:
    tokens = run.tokens // topology.num_chips
    advice = f"--batch with fewer than these {tokens:,} tokens a device, or more tensor parallelism"
  return UserError(
    f"the training step needs {need / 2**30:.1f} GiB on each device of {topology.describe()}, which"
    f" has {have / 2**30:.1f}, {held / 2**30:.1f} of them for weights and optimizer; use {advice}"
  )
