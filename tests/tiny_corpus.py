"""The corpus `beginnings`: of a few bundled documents, so that whole runs take seconds."""

import dataclasses
import itertools
from collections.abc import Iterator

from moe_jax.data.corpus import Document, get_corpus, register_corpus

DOCUMENTS, CHARACTERS = 48, 600
_WHOLE = get_corpus("sotu_1790_1870")


@dataclasses.dataclass(frozen=True)
class TinyCorpus:
  """48 documents of 600 characters; 3 of them are held out."""

  name: str = "beginnings"
  digest: str = f"{_WHOLE.digest}-{DOCUMENTS}-{CHARACTERS}"

  def documents(self) -> Iterator[Document]:
    """Yields the documents."""
    for document in itertools.islice(_WHOLE.documents(), DOCUMENTS):
      yield dataclasses.replace(document, text=document.text[:CHARACTERS])


register_corpus(TinyCorpus())
