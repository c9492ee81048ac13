"""What a word of `DataConfig.sources` says: where documents come from, and how they are read.

A word is a name and options, `NAME,option=value,...`:

- `sotu_1790_1870`: a registered corpus;
- `tfds:c4/en:3.1.0`: a TFDS builder with its config and version;
- `texts/`, `texts/*.jsonl`, `gs://bucket/texts`: a folder (with all folders in it), a glob or a
  file; the format of each file follows from its suffix alone, see `formats`.
"""

import dataclasses
import enum
import math
import re

from moe_jax.choices import as_choice, did_you_mean
from moe_jax.data.corpus import corpus_names
from moe_jax.errors import UserError

_TFDS = "tfds:"
_OPTION = re.compile(r",([a-z_]+)=")


class SourceKind(enum.StrEnum):
  """Who holds the documents."""

  CORPUS = "corpus"
  TFDS = "tfds"
  FILES = "files"


class DocumentUnit(enum.StrEnum):
  """What of a text file is a document."""

  FILE = "file"
  LINE = "line"


# The options that say something about each kind; `weight` goes with all.
_OPTIONS = {
  SourceKind.CORPUS: ("weight",),
  SourceKind.TFDS: ("weight", "text", "image", "split", "heldout"),
  SourceKind.FILES: ("weight", "text", "documents"),
}


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """One source of documents.

  Attributes:
    name: the word without its options.
    weight: the share of training records from this source is its weight over the sum of all.
    text: the field that holds the text, in files or data sets of records with fields.
    image: the field of a TFDS data set that holds an image beside the text; empty = none is read.
    split: the TFDS split to train on, as `train` or `train[:10%]`.
    heldout: the TFDS split to hold out; if empty, every 16th document of `split`.
    documents: whether a .txt file, or each line of it, is a document.
  """

  name: str
  weight: float = 1.0
  text: str = "text"
  image: str = ""
  split: str = "train"
  heldout: str = ""
  documents: DocumentUnit = DocumentUnit.FILE

  def __post_init__(self) -> None:
    unit = as_choice(DocumentUnit, "documents", self.documents)
    object.__setattr__(self, "documents", unit)
    if not 0 < self.weight < math.inf:
      raise UserError(
        f"the weight of source {self.name!r} is {self.weight}, but must be a finite number above 0."
      )
    if not self.name.removeprefix(_TFDS):
      raise UserError(
        "a source has no name; expected a registered corpus, tfds:NAME or a path to text."
      )
    _ = self.kind

  @property
  def kind(self) -> SourceKind:
    """Who holds the documents; UserError for a name that is neither of a corpus nor a path."""
    if self.name.startswith(_TFDS):
      return SourceKind.TFDS
    if self.name in corpus_names():
      return SourceKind.CORPUS
    if re.search(r"[/.*]|^~", self.name):
      return SourceKind.FILES
    raise UserError(
      f"source {self.name!r} is no registered corpus; {did_you_mean(self.name, corpus_names())}"
      f" (a folder is written with a slash, as {self.name}/, and a TFDS data set as"
      f" {_TFDS}{self.name})"
    )

  @property
  def builder(self) -> str:
    """The name of a TFDS data set, with its config and version."""
    return self.name.removeprefix(_TFDS)


def parse_source(word: str) -> SourceConfig:
  """Returns what a word of `DataConfig.sources` says.

  Raises:
    UserError: an unknown name or option, an option of another kind of source, or a bad value.
  """
  if not isinstance(word, str):
    raise UserError(f"source {word!r} is no text; expected a word such as 'texts/,weight=2'.")
  name, *rest = _OPTION.split(word)
  options = dict(zip(rest[::2], rest[1::2], strict=True))
  if len(options) < len(rest) // 2:
    raise UserError(f"source {word!r} gives an option twice; give each once.")
  known = _OPTIONS[SourceConfig(name).kind]
  for option in options:
    if option not in known:
      raise UserError(
        f"source {word!r} has an option {option!r} that it does not know;"
        f" {did_you_mean(option, known)}"
      )
  return SourceConfig(name, **(options | _weight(word, options)))


def _weight(word: str, options: dict[str, str]) -> dict[str, float]:
  if "weight" not in options:
    return {}
  try:
    return {"weight": float(options["weight"])}
  except ValueError:
    raise UserError(
      f"source {word!r} has weight {options['weight']!r}, but must have a number above 0."
    ) from None
