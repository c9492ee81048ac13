"""What is published of each kind of TPU chip.

Sources: the specification tables of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. There the
bandwidth of the interconnect is given for a chip in both directions; a link has one of its
directions, so 1200 GB/s over 6 links are 100 GB/s each way on each. The network of the data centre
is given a chip, or a pod, which is divided by its chips.
"""

import dataclasses

from moe_jax.choices import did_you_mean
from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip; every rate is the published peak.

  Attributes:
    name: as in topologies.
    device_kind: what JAX calls it.
    hbm_bytes: memory.
    peak_flops: FLOP/s of bfloat16 products.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s of one link of the interconnect, one way.
    dimensions: of its torus; a chip has two links in each.
    wrap: shortest dimension of a slice whose ends are joined to a ring.
    dcn_bandwidth: bytes/s to other slices, one way.
    max_chips: of the largest slice.
  """

  name: str
  device_kind: str
  hbm_bytes: float
  peak_flops: float
  hbm_bandwidth: float
  link_bandwidth: float
  dimensions: int
  wrap: int
  dcn_bandwidth: float
  max_chips: int


_GIB, _GIGA, _TERA = 2.0**30, 1e9, 1e12
_GBIT = 1e9 / 8

CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      "v4",
      "TPU v4",
      32 * _GIB,
      275 * _TERA,
      1228 * _GIGA,
      50 * _GIGA,
      dimensions=3,
      wrap=4,
      dcn_bandwidth=50 * _GBIT,
      max_chips=4096,
    ),
    Chip(
      "v5e",
      "TPU v5 lite",
      16 * _GIB,
      197 * _TERA,
      819 * _GIGA,
      50 * _GIGA,
      dimensions=2,
      wrap=16,
      dcn_bandwidth=25 * _GBIT,
      max_chips=256,
    ),
    Chip(
      "v5p",
      "TPU v5",
      95 * _GIB,
      459 * _TERA,
      2765 * _GIGA,
      100 * _GIGA,
      dimensions=3,
      wrap=4,
      dcn_bandwidth=50 * _GBIT,
      max_chips=6144,
    ),
    Chip(
      "v6e",
      "TPU v6 lite",
      32 * _GIB,
      918 * _TERA,
      1600 * _GIGA,
      100 * _GIGA,
      dimensions=2,
      wrap=16,
      dcn_bandwidth=100 * _GBIT,
      max_chips=256,
    ),
  )
}


def get_chip(name: str) -> Chip:
  """Returns the chip of that name.

  Raises:
    UserError: none has it.
  """
  if name not in CHIPS:
    raise UserError(f"{name!r} is not a chip that can be planned for; {did_you_mean(name, CHIPS)}")
  return CHIPS[name]
