"""How the commands' tables look."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

WIDTH = 100
_UNITS = ("", "K", "M", "G", "T", "P", "E")


def plain_table(*columns: str) -> Table:
  """Returns an empty table whose first column is words and whose others are numbers."""
  table = Table(box=SIMPLE_HEAD, pad_edge=False)
  for i, column in enumerate(columns):
    table.add_column(column, justify="right" if i else "left", no_wrap=True)
  return table


def compact(value: float) -> str:
  """Writes a number with four digits and a decimal unit: 46702792704 -> 46.70 G."""
  power = 0
  while abs(value) >= 999.95 and power < len(_UNITS) - 1:
    value, power = value / 1000, power + 1
  return f"{value:#.4g} {_UNITS[power]}" if power else f"{value:.4g}"
