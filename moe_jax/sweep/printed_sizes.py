"""Parameter counts that papers print beside the exact ones of the sizes that they publish."""

import dataclasses
import functools
import re
from collections.abc import Sequence

from moe_jax.config.load import load_config, run_file
from moe_jax.errors import UserError
from moe_jax.planning.count import ParameterCount, count_parameters
from moe_jax.sweep.claims import Verdict
from moe_jax.training.config import model_from

_PRINTED = re.compile(r"(\d+(?:\.\d+)?)([MBT])")
_UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}
_NOT_PRINTED, _NONE = "not printed", "none"

_INTRO = """# Printed and exact parameter counts

**Question.** Do the parameter counts that papers and model cards print agree with the arithmetic of
the sizes that they publish?

**Answer.** Mostly, once the convention is known. *Active* is everything but the experts that a
token does not visit, and is printed under three conventions: with embedding and head, without the
input embedding (a look-up), without both. All exact counts here are of this package's configs; the
tests hold them to independent counts and to the shapes of the real models. `moe-jax plan` prints
them for any config. Printed figures are quoted as they are commonly cited from papers and model
cards, not all of which could be consulted again.
"""


@dataclasses.dataclass(frozen=True)
class Figure:
  """A model and its printed counts.

  Attributes:
    name: of the model.
    config: of this repository, as "configs/mixtral.py:8x7b".
    total, active: as printed, such as "46.7B"; None where there is none to quote.
    note: why they differ from the exact ones if they do.
  """

  name: str
  config: str
  total: str | None
  active: str | None
  note: str = ""

  def __post_init__(self):
    for printed in (self.total, self.active):
      if printed is not None and not _PRINTED.fullmatch(printed):
        raise UserError(
          f"the printed count {printed!r} of {self.name} is none; expected digits and M, B or T, as"
          ' "46.7B"'
        )


@dataclasses.dataclass(frozen=True)
class WrongClaim:
  """A count in circulation that no arithmetic of the model gives."""

  text: str
  config: str
  reason: str


@dataclasses.dataclass(frozen=True)
class PrintedSizes:
  """What a `sizes.py` says is printed."""

  figures: tuple[Figure, ...]
  wrong: tuple[WrongClaim, ...]


def load_sizes(path: str) -> PrintedSizes:
  """Runs a file and returns what its `get_sizes` returns.

  Raises:
    UserError: no such file, it fails, or it makes none.
  """
  make = run_file(path).get("get_sizes")
  found = make() if callable(make) else None
  if not isinstance(found, PrintedSizes):
    raise UserError(f"{path} has no function get_sizes() that returns PrintedSizes")
  return found


@functools.cache
def count(config: str) -> ParameterCount:
  """Returns the exact counts of a config of this repository."""
  return count_parameters(model_from(load_config(config).to_dict()))


def agrees(exact: int, printed: str | None) -> bool:
  """Tells whether a number, rounded to the digits of the printed one, is that one, if any."""
  if printed is None:
    return True
  digits, unit = _parts(printed)
  decimals = len(digits.partition(".")[2])
  return f"{exact / _UNITS[unit]:.{decimals}f}" == digits


def convention(exact: ParameterCount, printed: str | None) -> str | None:
  """Returns the first convention under which the active parameters are the printed figure."""
  if printed is None:
    return _NOT_PRINTED
  return next((name for name, number in _active(exact).items() if agrees(number, printed)), None)


def sizes_page(sizes: PrintedSizes) -> str:
  """Returns the README: what is printed, what it comes to, and what is wrong in circulation."""
  lines = [
    _INTRO,
    "A printed figure in bold is not the exact one rounded.",
    "",
    "| model | config | printed total / active | total | active | without input embedding"
    " | printed active is | remark |",
    "|---|---|---|---|---|---|---|---|",
    *map(_row, sizes.figures),
    "",
    "## Wrong in circulation",
    "",
    "| claim | exact total | why it is wrong |",
    "|---|---|---|",
    *(f"| {each.text} | {count(each.config).total:,} | {each.reason} |" for each in sizes.wrong),
  ]
  return "\n".join(lines) + "\n"


def size_rows(figures: Sequence[Figure]) -> list[list[str]]:
  """Returns a row for each printed count: model, which, printed, exact, difference, verdict."""
  rows = []
  for figure in figures:
    exact = count(figure.config)
    for which, printed, numbers in (
      ("total", figure.total, [exact.total]),
      ("active", figure.active, list(_active(exact).values())),
    ):
      if printed is not None:
        rows.append([figure.name, which, printed, *_compared(printed, numbers), figure.config])
  return rows


def _compared(printed: str, numbers: Sequence[int]) -> tuple[str, str, str]:
  """Returns the first number that rounds to the printed one, else the nearest; how it differs."""
  digits, unit = _parts(printed)
  value = float(digits) * _UNITS[unit]
  agreeing = [number for number in numbers if agrees(number, printed)]
  shown = agreeing[0] if agreeing else min(numbers, key=lambda number: abs(number - value))
  verdict = Verdict.REPRODUCED if agreeing else Verdict.NOT_REPRODUCED
  return f"{shown:,}", f"{100 * (shown / value - 1):+.2f} %", f"**{verdict}**"


def _parts(printed: str) -> tuple[str, str]:
  return _PRINTED.fullmatch(printed).groups()


def _active(exact: ParameterCount) -> dict[str, int]:
  """Returns the active parameters under each convention by which they are printed."""
  return {
    "all": exact.active,
    "without input embedding": exact.active_without_input_embedding,
    "without embeddings": exact.active_without_embeddings,
  }


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
    found or _NONE,
    figure.note,
  )
  return f"| {' | '.join(cells)} |"
