"""Numbers quoted from papers: experiments/paper_values.yaml."""

import dataclasses
from pathlib import Path

import yaml

from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PaperValue:
  """A number as a paper gives it.

  Attributes:
    source: arXiv id and table, figure or section.
    value: the number; None where the paper has a sentence or a figure only.
    unit: of the number.
    note: what it is made of.
    verified: whether it was read in the paper itself.
  """

  source: str
  value: float | None
  unit: str
  note: str
  verified: bool


def read_paper_values(path: Path) -> dict[str, PaperValue]:
  """Returns the values by name.

  Raises:
    UserError: the file is damaged; names the entry.
  """
  try:
    entries = yaml.safe_load(path.read_text())
  except yaml.YAMLError as error:
    raise UserError(f"{path} is no YAML ({' '.join(str(error).split())})") from error
  values = {}
  for name, entry in entries.items():
    try:
      values[name] = PaperValue(**entry)
    except TypeError as error:
      raise UserError(f"{path}: entry {name} is damaged ({error})") from error
  return values
