"""Writes the table of printed and exact parameter counts into this folder's README.

Run from the repository's root, in seconds: python -m experiments.published_sizes.table
"""

import re
from pathlib import Path

from experiments.published_sizes.figures import CLAIMS, FIGURES, Claim, Figure
from moe_jax.config.load import load_config
from moe_jax.planning.count import ParameterCount, count_parameters
from moe_jax.training.config import model_from

README = Path(__file__).parent / "README.md"

_UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}

_INTRO = """# Printed and exact parameter counts

**Question.** Do the parameter counts that papers and model cards print agree with the arithmetic of
the sizes that they publish?

**Answer.** Mostly, once the convention is known. *Active* is everything but the experts that a
token does not visit, and is printed under three conventions: with embedding and head, without the
input embedding (a look-up), without both. All exact counts here are of this package's configs; the
tests hold them to independent counts and to the shapes of the real models. `moe-jax plan` prints
them for any config. Printed figures are quoted as they are commonly cited from papers and model
cards, not all of which could be consulted again.

`python -m experiments.published_sizes.table` writes this page.
"""


def count(config: str) -> ParameterCount:
  """Returns the exact counts of a config of this repository."""
  return count_parameters(model_from(load_config(config).to_dict()))


def agrees(exact: int, printed: str | None) -> bool:
  """Tells whether a number, rounded to the digits of the printed one, is that one, if any."""
  if printed is None:
    return True
  digits, unit = re.fullmatch(r"([\d.]+)([MBT])", printed).groups()
  decimals = len(digits.partition(".")[2])
  return f"{exact / _UNITS[unit]:.{decimals}f}" == digits


def convention(exact: ParameterCount, printed: str | None) -> str | None:
  """Returns the first convention under which the active parameters are the printed figure."""
  if printed is None:
    return "not printed"
  conventions = {
    "all": exact.active,
    "without input embedding": exact.active_without_input_embedding,
    "without embeddings": exact.active_without_embeddings,
  }
  return next((name for name, number in conventions.items() if agrees(number, printed)), None)


def _row(figure: Figure) -> str:
  exact = count(figure.config)
  total = (figure.total or "-") if agrees(exact.total, figure.total) else f"**{figure.total}**"
  found = convention(exact, figure.active)
  active = (figure.active or "-") if found else f"**{figure.active}**"
  cells = (
    figure.name,
    f"`{figure.config.removeprefix('configs/')}`",
    f"{total} / {active}",
    f"{exact.total:,}",
    f"{exact.active:,}",
    f"{exact.active_without_input_embedding:,}",
    found or "none",
    figure.note,
  )
  return f"| {' | '.join(cells)} |"


def _claim(claim: Claim) -> str:
  return f"| {claim.text} | {count(claim.config).total:,} | {claim.reason} |"


def page() -> str:
  """Returns the README: what is printed, what it comes to, and what is wrong in circulation."""
  lines = [
    _INTRO,
    "A printed figure in bold is not the exact one rounded.",
    "",
    "| model | config | printed total / active | total | active | without input embedding"
    " | printed active is | remark |",
    "|---|---|---|---|---|---|---|---|",
    *map(_row, FIGURES),
    "",
    "## Wrong in circulation",
    "",
    "| claim | exact total | why it is wrong |",
    "|---|---|---|",
    *map(_claim, CLAIMS),
  ]
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  README.write_text(page())
