"""Cards: what one run of a sweep came to, and out of what, as one JSON file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.choices import did_you_mean
from moe_jax.config import chosen_fields
from moe_jax.errors import UserError
from moe_jax.training.config import experiment_from
from moe_jax.training.run_folder import identity, write_json

Card = Mapping[str, Any]
FORMAT = 1
DIVERGED = "diverged"


def card_file(folder: Path, arm: str, seed: int) -> Path:
  """Returns where the card of a run lies."""
  return folder / f"{arm}_{seed}.json"


def config_digest(mapping: Mapping[str, Any], start: Mapping[str, Any] | None = None) -> str:
  """Returns 16 hex digits of what decides the contents of a run, and the steps it must save.

  Fields at their defaults are left out: one that is new, and changes nothing, leaves cards valid.

  Args:
    mapping: the config of the run.
    start: where it starts, if not from new weights.
  """
  fields = chosen_fields(experiment_from(dict(mapping)))
  chosen = identity(fields)
  if steps := fields.get("checkpoint", {}).get("at"):
    chosen["checkpoint"] = {"at": steps}
  if start is not None:
    chosen["start"] = start
  return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def write_card(path: Path, card: Card) -> None:
  """Writes a card whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, {"format": FORMAT, **card})


def read_card(path: Path) -> Card:
  """Returns a card.

  Raises:
    UserError: the file is damaged or of another format.
  """
  try:
    card = json.loads(path.read_bytes())
    if card["format"] != FORMAT:
      raise ValueError(f"format {card['format']}, expected {FORMAT}")
    return {name: card[name] for name in card if name != "format"}
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"{path} is no card of a run ({type(error).__name__}: {error}); delete it to run it anew"
    ) from error


def has_diverged(card: Card) -> bool:
  """Tells whether a run diverged: its card has no losses."""
  return bool(card.get(DIVERGED))


def metric(card: Card, name: str) -> float:
  """Returns a number of a card by its dotted path; names within it may have dots too, as `at_1.25`.

  Raises:
    UserError: the card has no such number; names the nearest of that place.
  """
  place, parts = card, name.split(".")
  while parts:
    known = place if isinstance(place, Mapping) else {}
    lengths = [n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known]
    if not lengths:
      raise UserError(
        f"the card of {card.get('arm')} has no metric {name!r}; {did_you_mean(parts[0], known)}"
      )
    place, parts = place[".".join(parts[: lengths[0]])], parts[lengths[0] :]
  if isinstance(place, bool) or not isinstance(place, int | float):
    raise UserError(f"{name!r} of the card of {card.get('arm')} is {place!r}, and no number")
  return float(place)
