"""What a request would cost, from a table of list prices that is data with its source and date."""

import dataclasses
import json
from pathlib import Path

from experiments.cloud.request import Provisioning, Request
from experiments.cloud.slices import total_chips
from moe_jax.errors import UserError

_TABLE = Path(__file__).with_name("prices.json")


@dataclasses.dataclass(frozen=True)
class Cost:
  """A list price.

  Attributes:
    chips: of all slices.
    per_chip_hour: US dollars.
    basis: where the price comes from.
  """

  chips: int
  per_chip_hour: float
  basis: str

  @property
  def per_hour(self) -> float:
    """US dollars of an hour of all chips."""
    return self.chips * self.per_chip_hour


def estimate(request: Request) -> Cost:
  """Returns the list price of a request.

  Raises:
    UserError: the table has no such price: the region is unknown, or the capacity is reserved,
      whose price is in a contract; gives the flag that takes the price.
  """
  chips = total_chips(request.piece, request.num_slices)
  if request.price is not None:
    return Cost(chips, request.price, "--price")
  table = json.loads(_TABLE.read_text())
  regions = table["prices"][request.piece.chip]
  if request.provisioning is Provisioning.RESERVED:
    raise UserError(
      "the price of reserved chips is in your contract; give it as --price=DOLLARS_PER_CHIP_HOUR"
    )
  if request.region not in regions:
    raise UserError(
      f"no price of {request.piece.chip} in {request.region} is known, only in"
      f" {', '.join(sorted(regions))}; look it up and give it as --price=DOLLARS_PER_CHIP_HOUR"
    )
  price = regions[request.region][request.provisioning.value]
  return Cost(chips, price, f"{table['source']}; read {table['read']}")


def describe(cost: Cost, hours: float | None) -> str:
  """Returns the estimate in words, with what it leaves out."""
  lines = [
    f"estimate: {cost.chips:,} chips x ${cost.per_chip_hour:.4g} per chip-hour"
    f" = ${cost.per_hour:,.2f} an hour" + _total(cost, hours),
    f"  source: {cost.basis}",
    "  A list price, not your bill: discounts, disks, network, storage, taxes and hours of waiting"
    " or repeated work are not in it, and spot prices move.",
  ]
  return "\n".join(lines)


def _total(cost: Cost, hours: float | None) -> str:
  return "" if hours is None else f", about ${cost.per_hour * hours:,.0f} for {hours:g} hours"
