"""The plan of a training run on a pod, as plain numbers."""

import dataclasses
import math

from jax.sharding import Mesh

from moe_jax.planning.compiled import compile_step
from moe_jax.planning.flops import multi_token_flops_per_token, training_flops_per_token
from moe_jax.planning.pod import PodRun
from moe_jax.planning.roofline import ASSUMPTIONS, CollectiveCost, roofline
from moe_jax.planning.topology import Topology
from moe_jax.sharding.rules import rules_of


@dataclasses.dataclass(frozen=True)
class PodPlan:
  """What a step costs each device. Names are those of `moe-jax plan --topology=... --json`.

  Attributes:
    topology, num_chips: the pod.
    layout, mesh: the table of axes, and the sizes of the mesh axes above 1.
    dispatch, remat, accumulation_steps: of the run.
    batch_size, sequence_length: of a step.
    assumptions: what was chosen where the config is silent, and the model of time.
    parameter_bytes, optimizer_bytes, activation_bytes, peak_bytes, hbm_bytes: see `Memory`.
    fits: whether the peak is below the chip's memory.
    model_flops: that the model asks for: of all tokens, without recomputation, empty slots and
      masked places, over the devices.
    program_flops: that a device computes.
    program_hbm_bytes: that it reads and writes.
    collectives: by kind and mesh axes, the longest first.
    compute_seconds, memory_seconds, instruction_seconds, ici_seconds, dcn_seconds: see `Roofline`.
    step_seconds, mfu: with collectives overlapped as the compiled program has them.
    overlapped_step_seconds, overlapped_mfu: if all communication hid behind computation.
    compile_seconds: wall time on this machine.
  """

  topology: str
  num_chips: int
  layout: str
  mesh: dict[str, int]
  dispatch: str | None
  remat: str
  accumulation_steps: int
  batch_size: int
  sequence_length: int
  assumptions: tuple[str, ...]
  parameter_bytes: float
  optimizer_bytes: float
  activation_bytes: float
  peak_bytes: float
  hbm_bytes: float
  fits: bool
  model_flops: float
  program_flops: float
  program_hbm_bytes: float
  collectives: tuple[CollectiveCost, ...]
  compute_seconds: float
  memory_seconds: float
  instruction_seconds: float
  ici_seconds: float
  dcn_seconds: float
  step_seconds: float
  mfu: float
  overlapped_step_seconds: float
  overlapped_mfu: float
  compile_seconds: float


def plan_pod(run: PodRun, topology: Topology) -> PodPlan:
  """Compiles a run's step for a topology and returns what it costs.

  Raises:
    UserError: see `compile_step`.
  """
  compiled = compile_step(run, topology)
  times = roofline(compiled.program, compiled.mesh, topology, kernel_fill(run, compiled.mesh))
  model_flops = model_flops_per_device(run, topology)
  least = model_flops / topology.chip.peak_flops
  config, memory = run.experiment, compiled.memory
  return PodPlan(
    topology=f"{topology.num_slices}*{topology.name}" if topology.num_slices > 1 else topology.name,
    num_chips=topology.num_chips,
    layout=config.sharding.layout,
    mesh={axis: size for axis, size in compiled.mesh.shape.items() if size > 1},
    dispatch=config.model.moe.dispatch.value if config.model.moe else None,
    remat=config.model.remat.value,
    accumulation_steps=config.accumulation_steps,
    batch_size=config.batch_size,
    sequence_length=run.sequence_length,
    assumptions=(*run.assumptions, *ASSUMPTIONS),
    parameter_bytes=memory.parameters,
    optimizer_bytes=memory.optimizer,
    activation_bytes=memory.activations,
    peak_bytes=memory.peak,
    hbm_bytes=memory.capacity,
    fits=memory.peak <= memory.capacity,
    model_flops=model_flops,
    program_flops=times.flops,
    program_hbm_bytes=times.hbm_bytes,
    collectives=times.collectives,
    compute_seconds=times.compute,
    memory_seconds=times.memory,
    instruction_seconds=times.instructions,
    ici_seconds=times.ici,
    dcn_seconds=times.dcn,
    step_seconds=times.step,
    mfu=least / times.step,
    overlapped_step_seconds=times.overlapped_step,
    overlapped_mfu=least / times.overlapped_step,
    compile_seconds=compiled.seconds,
  )


def kernel_fill(run: PodRun, mesh: Mesh) -> float:
  """Returns the part of `ragged` dispatch's rows that are tokens where the load is balanced.

  With expert parallelism a device has room for all rows that can reach it, see
  `moe_jax.moe.ragged_exchange`.
  """
  moe, layout = run.experiment.model.moe, run.experiment.sharding.layout
  parts = math.prod(mesh.shape[axis] for axis in rules_of(layout).get("expert", ()))
  if moe is None or parts == 1:
    return 1.0
  routing = moe.routing
  return routing.top_k / (parts * min(routing.top_k, routing.num_experts // parts))


def model_flops_per_device(run: PodRun, topology: Topology) -> float:
  """Returns the FLOPs that the model's mathematics ask of each device in a step."""
  model = run.experiment.model
  per_token = training_flops_per_token(model, run.sequence_length)
  if model.mtp_depth:
    per_token += multi_token_flops_per_token(model, run.sequence_length)
  return per_token * run.tokens / topology.num_chips
