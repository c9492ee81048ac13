"""Tiny corpora that the data tests share."""

import dataclasses
from collections.abc import Iterator

import pytest

from moe_jax.data.corpus import Document, register_corpus


@dataclasses.dataclass(frozen=True)
class ListCorpus:
  """A corpus of given texts: also the proof that a new source needs three members."""

  name: str
  digest: str
  texts: tuple[str, ...]

  def documents(self) -> Iterator[Document]:
    yield from map(Document, self.texts)


@pytest.fixture(scope="session")
def tiny_corpus() -> ListCorpus:
  """40 short documents of different lengths; the 16th and the 32nd are held out."""
  corpus = ListCorpus("tiny", "tiny-1", tuple(f"document {i} " + "é" * i for i in range(40)))
  register_corpus(corpus)
  return corpus


@pytest.fixture(scope="session")
def short_corpus() -> ListCorpus:
  """Too few documents to hold one out."""
  corpus = ListCorpus("short", "short-1", ("one", "two"))
  register_corpus(corpus)
  return corpus
