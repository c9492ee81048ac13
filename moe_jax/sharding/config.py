"""What a config says about devices: the mesh, the table of axes, how experts are reached."""

import dataclasses
import enum
import math

from moe_jax.choices import as_choice
from moe_jax.errors import UserError
from moe_jax.sharding.mesh import MESH_AXES
from moe_jax.sharding.rules import RULES, rules_of, used_axes

# Mesh axes that may span slices: what crosses them is small, or seldom, or can be staged.
DCN_AXES = ("stage", "data", "fsdp", "expert")


class Exchange(enum.StrEnum):
  """How tokens reach experts on other devices: the same result at other costs."""

  # Each device sends each other one the rows of its experts: slots with their capacity's padding,
  # or exactly the rows of `dispatch = ragged`.
  ALL_TO_ALL = "all_to_all"
  # Every device gathers all tokens of its expert group, applies its experts, and the results are
  # summed where the tokens came from ("ring of experts"): for decoding and small batches.
  ALL_GATHER = "all_gather"
  # The compiler inserts the all-to-alls of GShard (arXiv 2006.16668); `dispatch = einsum` alone.
  COMPILER = "compiler"


class ContextParallel(enum.StrEnum):
  """How queries see the keys of other devices where `sequence` splits them."""

  # Every device gathers the keys and values of the whole sequence (Llama 3, arXiv 2407.21783
  # section 3.3.2).
  ALL_GATHER = "all_gather"
  # Keys and values travel from device to device, one part in memory at a time (arXiv 2310.01889).
  RING = "ring"


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
  """Devices of a run: a mesh of named axes and a table that says what is split over which.

  All sizes 1, the default, is one device. A batch is split over `data`, `fsdp` and `expert`.

  Attributes:
    layout: a table of `moe_jax.sharding.rules.RULES`.
    stage: pipeline stages.
    data: copies of the parameters.
    fsdp: parts of each parameter, gathered where it is used.
    expert: groups of experts.
    sequence: parts of each sequence.
    tensor: parts of heads and hidden widths.
      One of these six may be -1: all devices that the others leave.
    dcn_stage, dcn_data, dcn_fsdp, dcn_expert: how many of that axis's parts lie in other slices,
      reached over the data-centre network; their product is the number of slices.
    exchange: see `Exchange`.
    hierarchical: an all-to-all over several mesh axes runs in one step an axis, so that what
      crosses slices crosses in few large messages.
    chunks: parts of a device's tokens whose exchange may overlap with the experts' work on others.
    context: see `ContextParallel`; `ring` needs `sequence` greater than 1.
  """

  layout: str = "dp"
  stage: int = 1
  data: int = 1
  fsdp: int = 1
  expert: int = 1
  sequence: int = 1
  tensor: int = 1
  dcn_stage: int = 1
  dcn_data: int = 1
  dcn_fsdp: int = 1
  dcn_expert: int = 1
  exchange: Exchange = Exchange.ALL_TO_ALL
  hierarchical: bool = False
  chunks: int = 1
  context: ContextParallel = ContextParallel.ALL_GATHER

  def __post_init__(self):
    object.__setattr__(self, "exchange", as_choice(Exchange, "exchange", self.exchange))
    object.__setattr__(self, "context", as_choice(ContextParallel, "context", self.context))
    rules_of(self.layout)
    self._check_sizes()
    if self.context == ContextParallel.RING and self.sequence == 1:
      raise UserError(
        "context = ring is refused with sequence = 1, which leaves no ring: use sequence greater"
        " than 1, or context = all_gather"
      )
    for axis in MESH_AXES:
      if self.sizes[axis] != 1 and axis not in used_axes(self.layout):
        others = [name for name in RULES if axis in used_axes(name)]
        raise UserError(
          f"{axis} = {self.sizes[axis]} is refused: layout = {self.layout} splits nothing over"
          f" {axis}; use {' or '.join(others)}, or {axis} = 1"
        )
    if self.chunks < 1:
      raise UserError(f"chunks = {self.chunks} is refused: it must be at least 1")
    if self.exchange != Exchange.ALL_TO_ALL and (self.hierarchical or self.chunks > 1):
      field = "hierarchical = true" if self.hierarchical else f"chunks = {self.chunks}"
      raise UserError(f"{field} is refused with exchange = {self.exchange}: use all_to_all")
    steps = [axis for axis in rules_of(self.layout).get("expert", ()) if self.sizes[axis] != 1]
    if self.hierarchical and len(steps) < 2:
      raise UserError(
        f"hierarchical = true is refused: layout = {self.layout} splits experts over"
        f" {' and '.join(steps) or 'nothing'}, which leaves no steps to take; use layout = ep_wide"
        " with data and expert greater than 1"
      )

  def _check_sizes(self) -> None:
    for name, size in self.sizes.items():
      if size < 1 and size != -1:
        raise UserError(f"{name} = {size} is refused: it must be at least 1, or -1 for the rest")
    rest = [name for name, size in self.sizes.items() if size == -1]
    if len(rest) > 1:
      raise UserError(f"{' and '.join(rest)} are both -1: one axis alone can take the rest")
    for name, size in self.dcn_sizes.items():
      if size < 1 or (self.sizes[name] != -1 and self.sizes[name] % size):
        raise UserError(
          f"dcn_{name} = {size} is refused: it must divide {name} = {self.sizes[name]}"
        )

  @property
  def sizes(self) -> dict[str, int]:
    """The size of every mesh axis, in the order of `MESH_AXES`."""
    return {axis: getattr(self, axis) for axis in MESH_AXES}

  @property
  def dcn_sizes(self) -> dict[str, int]:
    """How many of an axis's parts lie in other slices."""
    return {axis: getattr(self, f"dcn_{axis}") for axis in DCN_AXES}

  @property
  def num_slices(self) -> int:
    """Number of slices."""
    return math.prod(self.dcn_sizes.values())
