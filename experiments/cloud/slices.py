"""TPU slices as they are sold: accelerator types, and what GKE calls them."""

import dataclasses
import math

from moe_jax.choices import did_you_mean
from moe_jax.errors import UserError
from moe_jax.planning.chips import CHIPS
from moe_jax.planning.topology import Topology, parse_topology, slices_of

# What an accelerator type begins with. The number behind it counts cores where a chip has two, the
# torus of three dimensions, and chips otherwise (docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}).
_PREFIX = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
_GKE_LABEL = {
  "v4": "tpu-v4-podslice",
  "v5e": "tpu-v5-lite-podslice",
  "v5p": "tpu-v5p-slice",
  "v6e": "tpu-v6e-slice",
}
_CHIPS_OF_A_HOST = 4
# Slices of the flat pods that one host drives alone.
_MOST_ON_ONE_HOST = 8


@dataclasses.dataclass(frozen=True)
class Slice:
  """One TPU slice.

  Attributes:
    topology: chip and shape.
  """

  topology: Topology

  @property
  def accelerator_type(self) -> str:
    """As `gcloud --accelerator-type` takes it, `v5p-128`."""
    return f"{_PREFIX[self.chip]}-{self.chips * _cores(self.chip)}"

  @property
  def chip(self) -> str:
    """The kind of chip, `v5p`."""
    return self.topology.chip.name

  @property
  def chips(self) -> int:
    """Chips of the slice."""
    return self.topology.num_chips

  @property
  def chips_per_host(self) -> int:
    """Chips that one host drives."""
    alone = self.topology.chip.dimensions == 2 and self.chips <= _MOST_ON_ONE_HOST
    return self.chips if alone else _CHIPS_OF_A_HOST

  @property
  def hosts(self) -> int:
    """Hosts, each of which runs one process."""
    return self.chips // self.chips_per_host

  @property
  def gke_accelerator(self) -> str:
    """The value of the node label `cloud.google.com/gke-tpu-accelerator`."""
    return _GKE_LABEL[self.chip]

  @property
  def shape(self) -> str:
    """The torus, `4x4x4`."""
    return self.topology.name.partition(":")[2]


def parse_slice(text: str, topology: str | None = None) -> Slice:
  """Returns the slice of an accelerator type such as `v5p-128`, or of `v5p:4x4x4`.

  Args:
    text: the type.
    topology: the shape that the caller expects, such as `4x4x4`; None takes the usual one.

  Raises:
    UserError: there is no such slice, or it has another number of chips than the topology.
  """
  if ":" in text:
    found = Slice(parse_topology(text))
  else:
    found = _of_type(text)
  if topology is None:
    return found
  wanted = Slice(parse_topology(f"{found.chip}:{topology}"))
  if wanted.chips != found.chips:
    raise UserError(
      f"--topology={topology} has {wanted.chips} chips and --accelerator={text} has {found.chips}:"
      f" give --accelerator={wanted.accelerator_type}, or --topology={found.shape}"
    )
  return wanted


def _of_type(text: str) -> Slice:
  types = _types()
  if text not in types:
    near = _nearest_size(text, types)
    meant = did_you_mean(text, types) if near is None else f"did you mean {near}?"
    raise UserError(f"--accelerator={text} is no TPU slice that is sold; {meant}")
  return types[text]


def _nearest_size(text: str, types: dict[str, Slice]) -> str | None:
  """Returns the type of the same chip whose number is nearest; None if the chip is unknown."""
  prefix, _, number = text.rpartition("-")
  same = [name for name in types if name.rpartition("-")[0] == prefix]
  if not same or not number.isdecimal():
    return None
  return min(same, key=lambda name: abs(int(name.rpartition("-")[2]) - int(number)))


def _types() -> dict[str, Slice]:
  """Returns the slices by type; of several shapes with as many chips, the most compact one."""
  found: dict[str, Slice] = {}
  for chip in CHIPS.values():
    for shape in slices_of(chip):
      made = Slice(Topology(chip, shape))
      found.setdefault(made.accelerator_type, made)
  return found


def _cores(chip: str) -> int:
  return 2 if CHIPS[chip].dimensions == 3 else 1


def total_chips(piece: Slice, num_slices: int) -> int:
  """Returns the chips of several equal slices."""
  return math.prod((piece.chips, num_slices))
