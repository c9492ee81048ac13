"""Compiled programs as data: computations, instructions, and how often each one runs.

XLA prints a compiled program as text. Its own `cost_analysis` counts the body of a loop once,
however often it runs; here every instruction knows its number of runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_ITEM_BYTES = {
  "pred": 1,
  "s4": 0.5,
  "u4": 0.5,
  "s8": 1,
  "u8": 1,
  "f8e4m3fn": 1,
  "f8e5m2": 1,
  "s16": 2,
  "u16": 2,
  "bf16": 2,
  "f16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
  "c64": 8,
}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a type: its sizes, its bytes, and whether it lies in HBM or on the chip."""

  dtype: str
  shape: tuple[int, ...]
  in_hbm: bool

  @property
  def num_bytes(self) -> float:
    """Bytes without padding."""
    return _ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the program.
    type: as printed, a tuple's with parentheses.
    opcode: such as "fusion".
    operands: names of instructions of the same computation; a parameter's is its number.
    attributes: what follows the operands.
    is_root: whether the computation returns it.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    """The arrays of the result, in order."""
    return tuple(_arrays(self.type))

  @property
  def num_bytes(self) -> float:
    """Bytes of the result."""
    return sum(array.num_bytes for array in self.arrays)

  def attribute(self, name: str) -> str | None:
    """Returns the value of `name=value`, up to the next comma outside brackets."""
    found = re.search(rf"(?:^|, ){name}=", self.attributes)
    return None if found is None else _balanced(self.attributes, found.end())

  def calls(self, *names: str) -> list[str]:
    """Returns the computations that the given attributes name."""
    values = (self.attribute(name) for name in names)
    return [found for value in values if value for found in _NAME.findall(value)]


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in the order of the text."""

  name: str
  instructions: dict[str, Instruction]

  @property
  def root(self) -> Instruction:
    """What the computation returns."""
    return next(each for each in self.instructions.values() if each.is_root)

  def operands(self, instruction: Instruction) -> list[Instruction]:
    """Returns the instructions that one reads."""
    return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclasses.dataclass(frozen=True)
class Step:
  """An instruction of a running program.

  Attributes:
    instruction: the line.
    computation: where it stands.
    runs: how often it runs in one call of the program.
    fused: whether it is part of a fusion, so that its operands and result are never stored.
  """

  instruction: Instruction
  computation: Computation
  runs: float
  fused: bool


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program: its computations by name, and the one that is called."""

  computations: dict[str, Computation]
  entry: str

  def steps(self) -> Iterator[Step]:
    """Yields every instruction that runs, those of loops with the product of their trip counts.

    What reductions and sorts apply element by element is left out; of a conditional's branches
    each counts once.
    """
    yield from self._steps(self.computations[self.entry], 1.0, False)

  def _steps(self, computation: Computation, runs: float, fused: bool) -> Iterator[Step]:
    for instruction in computation.instructions.values():
      yield Step(instruction, computation, runs, fused)
      for name, times, inner in self._called(instruction):
        yield from self._steps(self.computations[name], runs * times, fused or inner)

  def _called(self, instruction: Instruction) -> list[tuple[str, float, bool]]:
    match instruction.opcode:
      case "while":
        times = self.trip_count(instruction)
        return [(name, times, False) for name in instruction.calls("body")]
      case "fusion":
        return [(name, 1, True) for name in instruction.calls("calls")]
      case "call" | "call-start":
        return [(name, 1, False) for name in instruction.calls("to_apply", "calls")]
      case "async-start":
        return [(name, 1, False) for name in instruction.calls("calls")]
      case "conditional":
        names = instruction.calls("branch_computations", "true_computation", "false_computation")
        return [(name, 1, False) for name in names]
    return []

  def trip_count(self, loop: Instruction) -> float:
    """Returns how often a loop runs; 1 where the text does not tell.

    Either the compiler notes it, or the condition compares a counter from 0 with a constant.
    """
    noted = _TRIPS.search(loop.attributes)
    if noted:
      return float(noted[1])
    bounds = [
      bound for name in loop.calls("condition") for bound in self._bounds(self.computations[name])
    ]
    return max(bounds, default=1.0)

  def _bounds(self, condition: Computation) -> Iterator[float]:
    for instruction in condition.instructions.values():
      if instruction.opcode == "constant" and instruction.type.startswith("s32[]"):
        yield float(instruction.operands[0])
      for name, _, _ in self._called(instruction):
        yield from self._bounds(self.computations[name])


def parse_program(text: str) -> Program:
  """Returns the program of `compiled.as_text()`."""
  computations, entry, name, body = {}, "", None, {}
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      name, body = head[2], {}
      entry = name if head[1] else entry
    elif line.startswith("}") and name is not None:
      computations[name], name = Computation(name, body), None
    elif name is not None:
      instruction = _instruction(line)
      if instruction is not None:
        body[instruction.name] = instruction
  return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
  found = _INSTRUCTION.match(line)
  if found is None:
    return None
  rest = found[3]
  kind = _type(rest)
  opcode, _, behind = rest[len(kind) :].lstrip().partition("(")
  inside = _balanced(behind, 0, stop=")")
  names = _NAME.findall(inside)
  if opcode in ("constant", "parameter"):
    names = [inside.strip()]
  return Instruction(
    found[2],
    kind,
    opcode.strip(),
    tuple(names),
    behind[len(inside) + 1 :].lstrip(", "),
    found[1] is not None,
  )


def _type(text: str) -> str:
  """Returns the type at the start of a text."""
  if text.startswith("("):
    return "(" + _balanced(text, 1, stop=")") + ")"
  return text.partition(" ")[0]


def _balanced(text: str, start: int, stop: str = ",") -> str:
  """Returns the text up to `stop` outside brackets."""
  depth = 0
  for i in range(start, len(text)):
    if depth == 0 and text[i] == stop:
      return text[start:i]
    if text[i] in "([{":
      depth += 1
    elif text[i] in ")]}":
      depth -= 1
  return text[start:]


def _arrays(text: str) -> Iterator[Array]:
  for dtype, sizes, layout in _ARRAY.findall(text):
    if dtype in _ITEM_BYTES:
      shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
      # Memory space 0, the default, is HBM; the others are on the chip.
      yield Array(dtype, shape, "S(" not in layout)
