"""What a compiled program does on one device: FLOPs of its products, bytes to and from memory."""

import dataclasses
import json
import math
import re

import numpy as np

from moe_jax.planning.hlo import Array, Computation, Instruction, Program, Step

# What moves nothing: it names, regroups or only waits for data.
_FREE = frozenset(
  {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "call-start",
    "call-done",
    "copy-done",
    "all-gather-done",
    "all-reduce-done",
    "collective-permute-done",
    "after-all",
    "async-start",
    "async-update",
    "async-done",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "iota",
  }
)
_SLICES = ("dynamic-slice", "slice", "gather")
_RENAMES = ("bitcast", "copy", "convert", "reshape", "transpose")
_WINDOW = re.compile(r"(\w+)=([\dx_\-]+)")


@dataclasses.dataclass(frozen=True)
class ProgramCosts:
  """Work of one device in one call of a program.

  Attributes:
    flops: of products, a multiply-add is 2.
    hbm_bytes: read and written by instructions that no fusion hides; buffers that the compiler
      keeps on the chip are left out.
  """

  flops: float
  hbm_bytes: float


def program_costs(program: Program) -> ProgramCosts:
  """Returns what a program costs, loops counted as often as they run."""
  flops = hbm = 0.0
  for step in program.steps():
    flops += step.runs * instruction_flops(step)
    if not step.fused:
      hbm += step.runs * instruction_traffic(step, program)
  return ProgramCosts(flops, hbm)


def instruction_flops(step: Step) -> float:
  """Returns the FLOPs of a product, 0 of anything else."""
  match step.instruction.opcode:
    case "convolution":
      return _convolution_flops(step.instruction, step.computation)
    case "dot":
      return _dot_flops(step.instruction, step.computation)
    case "custom-call":
      return _kernel_flops(step.instruction)
  return 0.0


def _dot_flops(dot: Instruction, computation: Computation) -> float:
  left = computation.operands(dot)[0].arrays[0]
  contracted = [int(i) for i in re.findall(r"\d+", dot.attribute("lhs_contracting_dims") or "")]
  depth = math.prod(left.shape[i] for i in contracted)
  return 2.0 * math.prod(dot.arrays[0].shape) * depth


def _convolution_flops(convolution: Instruction, computation: Computation) -> float:
  """Counts the products of a convolution whose operand is no padding; TPUs multiply by them.

  Their batched products are convolutions over the batch, dilated so that all but one place of the
  kernel meets padding.
  """
  left, kernel = (each.arrays[0] for each in computation.operands(convolution)[:2])
  labels = re.match(r"(\w+)_(\w+)->(\w+)", convolution.attribute("dim_labels") or "")
  inputs, kernels, outputs = labels.groups()
  out = convolution.arrays[0]
  spatial = sorted(label for label in outputs if label.isdigit())
  window = _window(convolution.attribute("window"), len(spatial))
  pairs = 1.0
  for i, label in enumerate(spatial):
    sizes = left.shape[inputs.index(label)], out.shape[outputs.index(label)]
    pairs *= _valid_pairs(*sizes, {name: values[i] for name, values in window.items()})
  # A kernel's input features are those of one group.
  features = math.prod(out.shape[outputs.index(label)] for label in "bf")
  return 2.0 * pairs * features * kernel.shape[kernels.index("i")]


def _window(text: str | None, dimensions: int) -> dict[str, list]:
  """Returns size, stride, pad (low, high), lhs_dilate and rhs_dilate of every dimension."""
  given = dict(_WINDOW.findall(text or ""))

  def numbers(name):
    values = given.get(name)
    return [int(value) for value in values.split("x")] if values else [1] * dimensions

  pads = given.get("pad")
  low = [int(pad.split("_")[0]) for pad in pads.split("x")] if pads else [0] * dimensions
  names = ("size", "stride", "lhs_dilate", "rhs_dilate")
  return {name: numbers(name) for name in names} | {"low": low}


def _valid_pairs(size: int, out: int, window: dict[str, int]) -> int:
  """Returns the pairs (output, kernel place) that read an element and neither padding nor a gap."""
  places = np.arange(out)[:, None] * window["stride"] - window["low"]
  places = places + np.arange(window["size"])[None] * window["rhs_dilate"]
  inside = (places >= 0) & (places <= (size - 1) * window["lhs_dilate"])
  return int(np.sum(inside & (places % window["lhs_dilate"] == 0)))


def _kernel_flops(call: Instruction) -> float:
  """Returns what a kernel's author says it computes, as Megablox does; 0 where nothing is said."""
  found = re.search(r'"cost_estimate":(\{[^}]*\})', call.attributes)
  return float(json.loads(found[1]).get("flops", 0)) if found else 0.0


def instruction_traffic(step: Step, program: Program) -> float:
  """Returns the bytes that an unfused instruction reads from and writes to HBM."""
  instruction, computation = step.instruction, step.computation
  if instruction.opcode in _FREE:
    return 0.0
  operands = computation.operands(instruction)
  match instruction.opcode:
    case "copy-start":
      return _in_hbm(instruction.arrays[:2])
    case "all-gather-start" | "collective-permute-start":
      # Its result names what it reads beside what it writes.
      return _in_hbm(instruction.arrays)
    case "fusion":
      return _fusion_traffic(instruction, operands, program)
    case "dynamic-update-slice":
      return 2 * _in_hbm(operands[1].arrays)
    case "dynamic-slice" | "slice" | "gather":
      return 2 * _in_hbm(instruction.arrays)
  return _in_hbm(instruction.arrays) + sum(_in_hbm(each.arrays) for each in operands)


def _fusion_traffic(fusion: Instruction, operands: list[Instruction], program: Program) -> float:
  inside = program.computations[fusion.calls("calls")[0]]
  users = _users(inside)
  parameters = {
    int(each.operands[0]): each
    for each in inside.instructions.values()
    if each.opcode == "parameter"
  }
  read = sum(
    min(_in_hbm(operand.arrays), _read_of(parameters[i], users, inside))
    for i, operand in enumerate(operands)
    if i in parameters and _in_hbm(operand.arrays)
  )
  return read + _written(fusion, inside)


def _read_of(parameter: Instruction, users: dict[str, list[Instruction]], inside) -> float:
  """Returns the bytes that a fusion reads of a parameter: its slices, where it takes only those."""
  total = 0.0
  for user in users.get(parameter.name, ()):
    if user.opcode in _SLICES:
      total += user.num_bytes
    elif user.opcode in _RENAMES:
      total += _read_of(user, users, inside)
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
      continue  # written in place
    else:
      return parameter.num_bytes
  return total


def _written(fusion: Instruction, inside: Computation) -> float:
  """Returns the bytes of a fusion's results; of one updated in place those of the update."""
  root = inside.root
  results = inside.operands(root) if root.opcode == "tuple" else [root]
  total = 0.0
  for result, array in zip(results, fusion.arrays, strict=False):
    while result.opcode in _RENAMES and inside.operands(result):
      result = inside.operands(result)[0]
    if result.opcode == "dynamic-update-slice":
      total += inside.operands(result)[1].num_bytes if array.in_hbm else 0.0
    else:
      total += _in_hbm((array,))
  return total


def _users(computation: Computation) -> dict[str, list[Instruction]]:
  users: dict[str, list[Instruction]] = {}
  for instruction in computation.instructions.values():
    for name in instruction.operands:
      users.setdefault(name, []).append(instruction)
  return users


def _in_hbm(arrays: tuple[Array, ...]) -> float:
  return sum(array.num_bytes for array in arrays if array.in_hbm)
