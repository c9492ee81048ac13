"""What a prepared data set says of itself: its files, their checksums, and what went into them."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from moe_jax.config.schema import dataclass_from, to_mapping
from moe_jax.data.images import ImageConfig
from moe_jax.data.packing import PackingCounts
from moe_jax.data.splits import Split
from moe_jax.errors import UserError

MANIFEST_FILE = "manifest.json"
_DIGEST = "sha256"


@dataclasses.dataclass(frozen=True)
class StoredFile:
  """A file of a data set: `records` is 0 for what holds plain text."""

  name: str
  split: Split
  records: int
  size: int
  sha256: str

  @classmethod
  def of(cls, path: Path, split: Split, records: int) -> "StoredFile":
    """Describes a file that is complete."""
    return cls(path.name, split, records, path.stat().st_size, sha256_of(path))

  def is_sound(self, folder: Path) -> bool:
    """Tells whether the file is there and holds what was written, reading all of it."""
    path = folder / self.name
    return self.has_its_size(folder) and sha256_of(path) == self.sha256

  def has_its_size(self, folder: Path) -> bool:
    """Tells whether the file is there and as long as it was."""
    path = folder / self.name
    return path.is_file() and path.stat().st_size == self.size


@dataclasses.dataclass
class Met:
  """What was met while the documents were read.

  Attributes:
    documents: that hold text; each ends with one eos.
    bytes: of text, after repair.
    empty_documents: without any text; they are left out.
    repaired_documents: with bytes that are no UTF-8, each run replaced by U+FFFD. A document of
      several stretches (of 4 MiB each) counts once a stretch.
    nul_bytes: kept.
    longer_than_context: documents of more than L tokens; they go on in the next record, without
      the context of the one before. With images: texts cut at the end of their record.
    ignored_files: whose suffix names no format, or that are hidden.
  """

  documents: int = 0
  bytes: int = 0
  empty_documents: int = 0
  repaired_documents: int = 0
  nul_bytes: int = 0
  longer_than_context: int = 0
  ignored_files: int = 0


@dataclasses.dataclass(frozen=True)
class SplitFacts:
  """What one split holds: `text_bytes` counts neither separators nor special tokens."""

  packing: PackingCounts
  text_bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
  """A complete data set of one source.

  Attributes:
    source: the word it was made from, without its weight.
    source_digest, tokenizer_digest: of what it was made with.
    sequence_length: L.
    pad_id: the id of padding.
    token_type: NumPy's name of the type of tokens on disk.
    shards: the records, in order within each split.
    texts: the beginning of the text of each split.
    train, heldout: what the splits hold.
    met: what was met in the source.
    image: of records with images.
  """

  source: str
  source_digest: str
  tokenizer_digest: str
  sequence_length: int
  pad_id: int
  token_type: str
  shards: tuple[StoredFile, ...]
  texts: tuple[StoredFile, ...]
  train: SplitFacts
  heldout: SplitFacts
  met: Met
  image: ImageConfig | None = None

  @property
  def fingerprint(self) -> str:
    """64 hex digits that change whenever the records do, and only then."""
    records = [(file.split, file.records, file.sha256) for file in self.shards]
    facts = [records, self.tokenizer_digest, self.sequence_length, self.pad_id]
    if self.image is not None:
      facts.append(to_mapping(self.image))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

  def facts(self, split: Split) -> SplitFacts:
    """Returns what a split holds."""
    return {Split.TRAIN: self.train, Split.HELDOUT: self.heldout}[split]

  def files(self, split: Split) -> list[StoredFile]:
    """Returns the shards of a split."""
    return [file for file in self.shards if file.split == split]


def sha256_of(path: Path) -> str:
  """Returns the checksum of a file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
  """Writes the manifest, with its own checksum, in one step: with it the data set is complete."""
  content = to_mapping(manifest)
  text = json.dumps({**content, _DIGEST: _digest(content)}, indent=1) + "\n"
  temporary = folder / (MANIFEST_FILE + ".tmp")
  with temporary.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, folder / MANIFEST_FILE)


def read_manifest(folder: Path) -> Manifest:
  """Reads the manifest of a data set and checks that every file is there and of its size.

  Raises:
    UserError: the data set is damaged.
  """
  try:
    content = json.loads((folder / MANIFEST_FILE).read_bytes())
    if content.pop(_DIGEST, None) != _digest(content):
      raise ValueError("its checksum does not fit")
    manifest = dataclass_from(Manifest, content, "manifest")
  except (AttributeError, OSError, RecursionError, TypeError, ValueError) as error:
    raise damaged(folder, f"{MANIFEST_FILE}: {error}") from error
  for file in (*manifest.shards, *manifest.texts):
    if not file.has_its_size(folder):
      raise damaged(folder, f"{file.name} is missing or cut")
  return manifest


def damaged(folder: Path, reason: object) -> UserError:
  """Returns the error about a data set that is not what was written."""
  return UserError(
    f"the prepared data in {str(folder)!r} are damaged ({reason}); "
    "delete that folder to have them made again."
  )


def _digest(content: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
