"""Named sources of documents.

A corpus is any object with the three members of `Corpus`. To add one (a folder of text, a TFDS data
set, a database), write such a class and call `register_corpus`; nothing downstream changes.
"""

import dataclasses
import hashlib
import importlib.resources
import json
import lzma
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from moe_jax.choices import did_you_mean
from moe_jax.data.splits import Split, split_of
from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and what is known about it, as year, president and party of an address."""

  text: str
  attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Corpus(Protocol):
  """A named, ordered, re-readable source of documents.

  Attributes:
    name: the value of `DataConfig.corpus`; letters, digits, `_` and `-` only, as it names a folder.
    digest: changes whenever the documents or their order change; data sets prepared from another
      digest are not reused.
  """

  name: str
  digest: str

  def documents(self) -> Iterator[Document]:
    """Yields all documents, each time in the same order."""


@dataclasses.dataclass(frozen=True)
class BundledCorpus:
  """A corpus that ships with the package as `corpora/NAME.jsonl.xz`.

  Attributes:
    name: the corpus.
    digest: SHA-256 of the uncompressed JSON lines.
    archive_sha256: SHA-256 of the xz file.
  """

  name: str
  digest: str
  archive_sha256: str

  def documents(self) -> Iterator[Document]:
    """Yields the documents in the order of the file.

    Raises:
      UserError: the file is not the one that was shipped.
    """
    file = importlib.resources.files("moe_jax.data.corpora") / f"{self.name}.jsonl.xz"
    packed = file.read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != self.archive_sha256:
      raise UserError(
        f"the bundled corpus {file} is damaged (SHA-256 {found}, expected {self.archive_sha256}); "
        "install moe_jax again."
      )
    for line in lzma.decompress(packed).splitlines():
      attributes = json.loads(line)
      yield Document(attributes.pop("text"), attributes)


_CORPORA: dict[str, Corpus] = {}


def register_corpus(corpus: Corpus) -> None:
  """Makes a corpus available under its name to `DataConfig` and `prepare`.

  Raises:
    UserError: another corpus has the name already.
  """
  if _CORPORA.setdefault(corpus.name, corpus) != corpus:
    raise UserError(f"a corpus named {corpus.name!r} is registered already; choose another name.")


def corpus_names() -> list[str]:
  """Returns the names of all registered corpora."""
  return list(_CORPORA)


def get_corpus(name: str) -> Corpus:
  """Returns the corpus registered under `name`; raises UserError with the nearest name."""
  if name not in _CORPORA:
    raise UserError(f"unknown corpus {name!r}; {did_you_mean(str(name), _CORPORA)}")
  return _CORPORA[name]


def split_documents(corpus: Corpus, split: Split) -> Iterator[Document]:
  """Yields the documents of one split in the order of the corpus."""
  for index, document in enumerate(corpus.documents()):
    if split_of(index) is split:
      yield document


# Digests as their notes in `corpora` have them.
for _corpus in (
  BundledCorpus(
    name="sotu_1790_1870",
    digest="c80358dc54eaf7084c4b48b857ee758a6bdc695709bd2d751cbf8c0bc0e5952b",
    archive_sha256="07d573bfc1651a3d80be33675bec8714f17356350d9544c8dcda4f0aab6ba367",
  ),
  BundledCorpus(
    name="python_3_11",
    digest="f54f48017e0e5114eb8a66959a8f0c6fdcdf5d04da0e552be31dbe7d2ae260d5",
    archive_sha256="e666407abbd73b2bcf3ebd33c611b64dffcd86e5058c212d170d23345fc852a1",
  ),
  BundledCorpus(
    name="king_james",
    digest="778b019474bb84b5d3554277ea18896fe7f445f5a718fde30f33f8be882ea349",
    archive_sha256="6b880e87960de95c9960fbc4411d8763b4d48590dc53bce191723f00023c607f",
  ),
):
  register_corpus(_corpus)
