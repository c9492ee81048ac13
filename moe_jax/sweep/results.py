"""Results of a recipe from its cards: the table of arms and the findings."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_jax.errors import UserError
from moe_jax.sweep.cards import Card, has_diverged
from moe_jax.sweep.claims import Finding, judge
from moe_jax.sweep.recipe import Recipe
from moe_jax.sweep.running import finished_card
from moe_jax.sweep.statistics import Interval, interval


@dataclasses.dataclass(frozen=True)
class ArmRow:
  """An arm in the table of results.

  Attributes:
    arm: its name.
    parameters, active: counts.
    flops_per_token: of training.
    loss: held-out, dropless, nats per token, over seeds that did not diverge; None if all did.
    diverged: seeds that did.
    max_violation: of the held-out load, mean over layers and seeds; None without experts.
    dropped_fraction: of the last training steps; None without experts.
    cpu_seconds: mean over seeds.
  """

  arm: str
  parameters: int
  active: int
  flops_per_token: float
  loss: Interval | None
  diverged: int
  max_violation: float | None
  dropped_fraction: float | None
  cpu_seconds: float


def cards_by_arm(recipe: Recipe, profile: str, folder: Path) -> dict[str, list[Card]]:
  """Returns the cards of each arm in the order of the seeds.

  Raises:
    UserError: one is missing, damaged or of another config.
  """
  found: dict[str, list[Card]] = {}
  for run in recipe.runs(profile):
    card = finished_card(run, folder)
    if card is None:
      raise UserError(f"{folder} has no card of run {run.name} of recipe {recipe.name} yet")
    found.setdefault(run.arm, []).append(card)
  return found


def arm_rows(cards: Mapping[str, Sequence[Card]]) -> list[ArmRow]:
  """Returns the table of arms."""
  return [_row(arm, own) for arm, own in cards.items()]


def loss_text(row: ArmRow) -> str:
  """Says the held-out loss of an arm, and how many seeds diverged if any did."""
  diverged = f"{row.diverged} diverged" if row.diverged else ""
  return ", ".join(filter(None, ("" if row.loss is None else str(row.loss), diverged)))


def findings(recipe: Recipe, profile: str, cards: Mapping[str, Sequence[Card]]) -> list[Finding]:
  """Returns what became of the claims that a profile decides."""
  return [judge(claim, cards) for claim in recipe.judged(profile)]


def _row(arm: str, cards: Sequence[Card]) -> ArmRow:
  first = cards[0]
  ended = [card for card in cards if not has_diverged(card)]

  def mean(section: str, name: str) -> float | None:
    values = [card[section].get(name) for card in ended if section in card]
    return sum(values) / len(values) if values and None not in values else None

  return ArmRow(
    arm=arm,
    parameters=first["parameters"]["total"],
    active=first["parameters"]["active"],
    flops_per_token=first["flops_per_token"],
    loss=interval([card["eval"]["loss"] for card in ended]) if ended else None,
    diverged=len(cards) - len(ended),
    max_violation=mean("routing", "max_violation"),
    dropped_fraction=mean("train", "dropped_fraction"),
    cpu_seconds=sum(card["cpu_seconds"] for card in cards) / len(cards),
  )
