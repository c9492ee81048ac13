"""The time of a step of a compiled program: a roofline over its instructions.

The model, all of it:

* An instruction takes the longer of its products at the chip's peak and its traffic at the peak
  bandwidth of memory; instructions follow one another.
* A collective takes what `moe_jax.planning.links` says. One that the compiler left synchronous
  stops everything else. Asynchronous ones hide behind the instructions as far as those last.
* Nothing else takes time: no latency, no host, no element-wise work that is not bound by memory.

So the time is a bound from below for this program, and the model's FLOP utilisation (MFU) one from
above; `experiments/pods` shows by how much measured steps differ.
"""

import dataclasses

from jax.sharding import Mesh

from moe_jax.planning.chips import Chip
from moe_jax.planning.collectives import Collective, find_collectives
from moe_jax.planning.hlo import Program
from moe_jax.planning.links import link_time
from moe_jax.planning.program_costs import instruction_flops, instruction_traffic
from moe_jax.planning.topology import Topology

ASSUMPTIONS = (
  "products and memory run at the chip's published peak, each instruction at the slower of both",
  "links run at their published bandwidth without latency; synchronous collectives hide behind"
  " nothing, asynchronous ones behind all else",
)


@dataclasses.dataclass(frozen=True)
class CollectiveCost:
  """All runs of the collectives of one kind over the same mesh axes, in one step.

  Attributes:
    kind, axes: what runs where.
    count: instructions of the program.
    runs: how often they run, together.
    num_bytes: see `Collective`; of all runs.
    ici_seconds, dcn_seconds: what they need on links and network.
    is_async: whether they may hide behind other work.
  """

  kind: str
  axes: tuple[str, ...]
  count: int
  runs: float
  num_bytes: float
  ici_seconds: float
  dcn_seconds: float
  is_async: bool


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Where the time of a step goes, in seconds a device.

  Attributes:
    flops, hbm_bytes: of a device.
    compute: of the products alone.
    memory: of the traffic alone.
    instructions: of both, the slower one for each instruction.
    collectives: see `CollectiveCost`.
  """

  flops: float
  hbm_bytes: float
  compute: float
  memory: float
  instructions: float
  collectives: tuple[CollectiveCost, ...]

  @property
  def ici(self) -> float:
    """Seconds on the links of a slice."""
    return sum(each.ici_seconds for each in self.collectives)

  @property
  def dcn(self) -> float:
    """Seconds on the network between slices."""
    return sum(each.dcn_seconds for each in self.collectives)

  @property
  def step(self) -> float:
    """Seconds of a step."""
    hidden = sum(each.ici_seconds + each.dcn_seconds for each in self.collectives if each.is_async)
    return max(self.instructions, hidden) + self.ici + self.dcn - hidden

  @property
  def overlapped_step(self) -> float:
    """Seconds of a step whose communication hides behind its work as far as that lasts."""
    return max(self.instructions, self.ici + self.dcn)


def roofline(
  program: Program, mesh: Mesh, topology: Topology, kernel_fill: float = 1.0
) -> Roofline:
  """Returns where the time of a program goes on a topology.

  Args:
    program: what one device runs.
    mesh: the devices.
    topology: where they are.
    kernel_fill: the part of the rows given to the kernels of `ragged` dispatch that are tokens;
      they skip the others, and say what all of them would cost.
  """
  flops, hbm_bytes, seconds = _work(program, topology.chip, kernel_fill)
  return Roofline(
    flops,
    hbm_bytes,
    flops / topology.chip.peak_flops,
    hbm_bytes / topology.chip.hbm_bandwidth,
    seconds,
    _by_axes(find_collectives(program, mesh), mesh, topology),
  )


def work_seconds(program: Program, chip: Chip) -> float:
  """Returns what the instructions of a program need on a chip, collectives left out."""
  return _work(program, chip, 1.0)[2]


def _work(program: Program, chip: Chip, kernel_fill: float) -> tuple[float, float, float]:
  """Returns FLOPs, bytes and seconds of all instructions; a fusion is one of them."""
  total_flops = total_bytes = seconds = 0.0
  flops, num_bytes, runs = 0.0, 0.0, 0.0
  for step in program.steps():
    if not step.fused:
      seconds += runs * max(flops / chip.peak_flops, num_bytes / chip.hbm_bandwidth)
      flops, num_bytes, runs = 0.0, instruction_traffic(step, program), step.runs
      total_bytes += runs * num_bytes
    own = instruction_flops(step)
    own *= kernel_fill if step.instruction.opcode == "custom-call" else 1.0
    flops += own
    total_flops += step.runs * own
  seconds += runs * max(flops / chip.peak_flops, num_bytes / chip.hbm_bandwidth)
  return total_flops, total_bytes, seconds


def _by_axes(
  collectives: list[Collective], mesh: Mesh, topology: Topology
) -> tuple[CollectiveCost, ...]:
  """Adds up the collectives of one kind over the same axes, the longest first."""
  found: dict[tuple, list[Collective]] = {}
  for each in collectives:
    found.setdefault((each.kind, each.axes, each.is_async), []).append(each)
  costs = []
  for (kind, axes, is_async), group in found.items():
    times = [link_time(each, mesh, topology) for each in group]
    costs.append(
      CollectiveCost(
        kind.value,
        axes,
        len(group),
        sum(each.runs for each in group),
        sum(each.runs * each.num_bytes for each in group),
        sum(each.runs * time.ici for each, time in zip(group, times, strict=True)),
        sum(each.runs * time.dcn for each, time in zip(group, times, strict=True)),
        is_async,
      )
    )
  return tuple(sorted(costs, key=lambda cost: -(cost.ici_seconds + cost.dcn_seconds)))
