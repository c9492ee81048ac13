"""One interface to all sources of documents: numbered streams of stretches of text."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Protocol

from moe_jax.data.corpus import Corpus, get_corpus
from moe_jax.data.files import open_files
from moe_jax.data.formats import Stretch
from moe_jax.data.sources import SourceConfig, SourceKind
from moe_jax.data.tfds_source import open_tfds


class Source(Protocol):
  """Documents in streams, each read from its beginning and always in the same order.

  Attributes:
    config: the source.
    digest: changes whenever the documents or their order change.
    streams: how many there are.
    heldout_streams: so many, from the first on, are held out as a whole; if 0, every 16th document
      of all is.
    size: how much there is to read, in bytes or records; 0 if that is not known.
    ignored: files that are there and not read.
  """

  config: SourceConfig
  digest: str
  streams: int
  heldout_streams: int
  size: int
  ignored: int

  def stretches(self, stream: int, first: int = 0) -> Iterator[Stretch]:
    """Yields the documents of a stream, from its `first` stretch on."""

  def offset(self, stream: int) -> int:
    """Returns where a stream begins, in the unit of `size`."""


@dataclasses.dataclass(frozen=True)
class CorpusSource:
  """A registered corpus as one stream."""

  config: SourceConfig
  streams: int = 1
  heldout_streams: int = 0
  size: int = 0
  ignored: int = 0

  @functools.cached_property
  def corpus(self) -> Corpus:
    """The corpus."""
    return get_corpus(self.config.name)

  @property
  def digest(self) -> str:
    """That of the corpus."""
    return self.corpus.digest

  def stretches(self, stream: int, first: int = 0) -> Iterator[Stretch]:
    """Yields the documents of the corpus."""
    del stream
    documents = itertools.islice(self.corpus.documents(), first, None)
    for number, document in enumerate(documents, start=first + 1):
      yield Stretch(document.text.encode(errors="surrogatepass"), True, True, number)

  def offset(self, stream: int) -> int:
    """The only stream begins at the beginning."""
    del stream
    return 0


_OPENERS = {
  SourceKind.CORPUS: CorpusSource,
  SourceKind.FILES: open_files,
  SourceKind.TFDS: open_tfds,
}


def open_source(config: SourceConfig) -> Source:
  """Returns the documents of a source.

  Raises:
    MissingSourceError: they are not there.
    UserError: they cannot be read.
  """
  return _OPENERS[config.kind](config)
