"""The collectives of a compiled program: what is exchanged, among which devices, how often."""

import dataclasses
import enum

import numpy as np
from jax.sharding import Mesh

from moe_jax.planning.hlo import Instruction, Program, Step
from moe_jax.planning.replica_groups import parse_groups, parse_pairs


class CollectiveKind(enum.StrEnum):
  """What devices do together."""

  ALL_GATHER = "all-gather"
  ALL_REDUCE = "all-reduce"
  REDUCE_SCATTER = "reduce-scatter"
  ALL_TO_ALL = "all-to-all"
  PERMUTE = "collective-permute"


# What XLA calls them; the asynchronous forms are counted where they start.
_OPCODES = {
  "all-gather": CollectiveKind.ALL_GATHER,
  "all-gather-start": CollectiveKind.ALL_GATHER,
  "all-reduce": CollectiveKind.ALL_REDUCE,
  "all-reduce-start": CollectiveKind.ALL_REDUCE,
  "reduce-scatter": CollectiveKind.REDUCE_SCATTER,
  "all-to-all": CollectiveKind.ALL_TO_ALL,
  "ragged-all-to-all": CollectiveKind.ALL_TO_ALL,
  "collective-permute": CollectiveKind.PERMUTE,
  "collective-permute-start": CollectiveKind.PERMUTE,
}
# TPUs compile a reduce-scatter to a fusion of this name, which holds an all-reduce.
_FUSED_REDUCE_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: what it does.
    num_bytes: of the whole array that a device takes part in: what an all-gather makes, what any
      other one is given. A ragged exchange moves at most so much.
    axes: the mesh axes over which it runs; empty where its groups follow no axes.
    groups: (groups, members) positions in the mesh, flattened.
    runs: how often it runs in a step.
    name: of its instruction.
    is_async: whether it may run beside other instructions.
  """

  kind: CollectiveKind
  num_bytes: float
  axes: tuple[str, ...]
  groups: np.ndarray
  runs: float
  name: str
  is_async: bool = False

  @property
  def size(self) -> int:
    """Devices of a group."""
    return self.groups.shape[1]


def find_collectives(program: Program, mesh: Mesh) -> list[Collective]:
  """Returns the collectives of more than one device, in the order of the program's text."""
  found = (_collective(step, mesh) for step in program.steps())
  return [each for each in found if each is not None and each.size > 1]


def mesh_axes_of(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
  """Returns the mesh axes along which the members of the groups differ.

  Empty where groups do not hold all combinations of those axes' places.
  """
  places = np.stack(np.unravel_index(groups[0], mesh.devices.shape))
  differ = [len(set(row)) for row in places]
  if int(np.prod(differ)) != groups.shape[1]:
    return ()
  return tuple(name for name, count in zip(mesh.axis_names, differ, strict=True) if count > 1)


def _collective(step: Step, mesh: Mesh) -> Collective | None:
  instruction = step.instruction
  kind = _OPCODES.get(instruction.opcode)
  if kind is None:
    return None
  if kind == CollectiveKind.PERMUTE:
    groups = parse_pairs(instruction.attribute("source_target_pairs") or "")
  else:
    groups = parse_groups(_groups_text(instruction), mesh.size)
  if kind == CollectiveKind.ALL_REDUCE and step.computation.name.startswith(_FUSED_REDUCE_SCATTER):
    kind = CollectiveKind.REDUCE_SCATTER
  num_bytes = _payload(kind, instruction, step, groups.shape[1])
  axes, is_async = mesh_axes_of(groups, mesh), instruction.opcode.endswith("-start")
  return Collective(kind, num_bytes, axes, groups, step.runs, instruction.name, is_async)


def _groups_text(instruction: Instruction) -> str:
  text = instruction.attribute("replica_groups") or ""
  # Axes of a mesh go on behind a comma.
  behind = instruction.attributes.partition("replica_groups=")[2]
  return behind if text.startswith("mesh[") else text


def _payload(kind: CollectiveKind, instruction: Instruction, step: Step, members: int) -> float:
  given = sum(operand.num_bytes for operand in step.computation.operands(instruction))
  if instruction.opcode == "ragged-all-to-all":
    # Its first operand is sent; the others are where to, and how much.
    return step.computation.operands(instruction)[0].num_bytes
  return given * members if kind == CollectiveKind.ALL_GATHER else given
