"""The bundled corpus is what its note says; sources are found by name."""

import hashlib
import importlib.resources
import lzma

import pytest

from moe_jax.data.corpus import BundledCorpus, get_corpus, register_corpus, split_documents
from moe_jax.data.splits import HELDOUT_EVERY, Split, split_of
from moe_jax.errors import UserError

FOLDER = importlib.resources.files("moe_jax.data.corpora")
PARTIES = {
  "Democratic",
  "Democratic-Republican",
  "Federalist",
  "National Union",
  "Republican",
  "Whig",
  "Whig & Democratic",
  "none",
}


@pytest.fixture(scope="module")
def addresses():
  return list(get_corpus("sotu_1790_1870").documents())


def test_sotu_has_one_address_a_year(addresses):
  assert [a.attributes["year"] for a in addresses] == list(range(1790, 1871))
  assert {a.attributes["party"] for a in addresses} == PARTIES
  assert addresses[0].attributes["president"] == "George Washington"
  assert sum(len(a.text.encode()) for a in addresses) == 3_557_651


# Documents, bytes of text, held-out documents, bytes of them.
SIZES = {
  "sotu_1790_1870": (81, 3_557_651, 5, 224_073),
  "python_3_11": (169, 3_777_621, 10, 200_989),
  "king_james": (1189, 4_136_661, 74, 250_811),
}


@pytest.mark.parametrize("name", SIZES)
def test_note_and_code_state_the_digests_of_the_file(name):
  packed = (FOLDER / f"{name}.jsonl.xz").read_bytes()
  note = (FOLDER / f"{name}.md").read_text()
  archive = hashlib.sha256(packed).hexdigest()
  lines = hashlib.sha256(lzma.decompress(packed)).hexdigest()
  corpus = get_corpus(name)
  assert (corpus.archive_sha256, corpus.digest) == (archive, lines)
  assert archive in note and lines in note


@pytest.mark.parametrize("name", SIZES)
def test_note_states_the_sizes(name):
  corpus = get_corpus(name)
  both = [list(corpus.documents()), list(split_documents(corpus, Split.HELDOUT))]
  sizes = [size for part in both for size in (len(part), sum(len(d.text.encode()) for d in part))]
  assert tuple(sizes) == SIZES[name]
  note = (FOLDER / f"{name}.md").read_text()
  assert all(f"{size:,}" in note for size in sizes)


def test_python_is_code_and_documentation():
  kinds = [d.attributes["kind"] for d in get_corpus("python_3_11").documents()]
  assert kinds == ["documentation"] * 48 + ["code"] * 121


def test_bible_has_its_chapters_in_order():
  chapters = [d.attributes for d in get_corpus("king_james").documents()]
  assert len({chapter["book"] for chapter in chapters}) == 66
  assert (chapters[0], chapters[-1]) == (
    {"book": "Ge", "chapter": 1},
    {"book": "Rev", "chapter": 22},
  )


def test_a_damaged_corpus_is_refused():
  corpus = BundledCorpus("sotu_1790_1870", digest="d", archive_sha256="0" * 64)
  with pytest.raises(UserError, match="is damaged"):
    next(corpus.documents())


def test_splits_share_no_document_and_lose_none(addresses):
  corpus = get_corpus("sotu_1790_1870")
  years = {split: [d.attributes["year"] for d in split_documents(corpus, split)] for split in Split}
  assert years[Split.HELDOUT] == [1805, 1821, 1837, 1853, 1869]
  assert sorted(years[Split.TRAIN] + years[Split.HELDOUT]) == list(range(1790, 1871))
  texts = {split: {d.text for d in split_documents(corpus, split)} for split in Split}
  assert not texts[Split.TRAIN] & texts[Split.HELDOUT]
  assert 150_000 < sum(len(text) for text in texts[Split.HELDOUT]) < 250_000


def test_every_sixteenth_document_is_held_out():
  held_out = [i for i in range(48) if split_of(i) is Split.HELDOUT]
  assert HELDOUT_EVERY == 16 and held_out == [15, 31, 47]


def test_unknown_corpus_names_the_nearest():
  with pytest.raises(UserError, match=r"unknown corpus 'sotu_1790'; .*sotu_1790_1870"):
    get_corpus("sotu_1790")


def test_a_second_corpus_of_the_same_name_is_refused():
  with pytest.raises(UserError, match="registered already"):
    register_corpus(BundledCorpus("sotu_1790_1870", digest="x", archive_sha256="y"))
