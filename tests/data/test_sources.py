"""A word of `DataConfig.sources` is read as written, or refused with the nearest valid one."""

import pytest

from moe_jax.data.config import DataConfig
from moe_jax.data.sources import DocumentUnit, SourceConfig, SourceKind, parse_source
from moe_jax.errors import UserError


@pytest.mark.parametrize(
  ("word", "kind", "expected"),
  [
    ("sotu_1790_1870", SourceKind.CORPUS, {"name": "sotu_1790_1870"}),
    ("sotu_1790_1870,weight=3", SourceKind.CORPUS, {"weight": 3.0}),
    ("tfds:c4/en:3.1.0,heldout=validation", SourceKind.TFDS, {"heldout": "validation"}),
    ("tfds:lm1b,split=train[:10%],text=text", SourceKind.TFDS, {"split": "train[:10%]"}),
    ("texts/", SourceKind.FILES, {"documents": DocumentUnit.FILE}),
    ("a,b/*.txt,documents=line", SourceKind.FILES, {"name": "a,b/*.txt", "documents": "line"}),
    ("gs://bucket/x.jsonl,text=content", SourceKind.FILES, {"text": "content"}),
  ],
)
def test_words_say_what_is_read(word, kind, expected):
  source = parse_source(word)
  assert source.kind == kind
  assert {name: getattr(source, name) for name in expected} == expected


@pytest.mark.parametrize(
  ("word", "message"),
  [
    ("sotu_1790_1871", "did you mean sotu_1790_1870"),
    ("texts", "a folder is written with a slash, as texts/"),
    ("texts/,wieght=2", "an option 'wieght' that it does not know; did you mean weight"),
    ("texts/,split=train", "an option 'split'"),
    ("tfds:c4/en,documents=line", "an option 'documents'"),
    ("texts/,weight=much", "weight 'much', but must have a number above 0"),
    ("texts/,weight=0", "weight of source 'texts/' is 0.0"),
    ("texts/,weight=nan", "weight of source 'texts/' is nan"),
    ("texts/,weight=1,weight=2", "gives an option twice"),
    ("texts/,documents=lines", "did you mean 'line'"),
    ("tfds:", "a source has no name"),
    ("", "a source has no name"),
  ],
)
def test_bad_words_are_named(word, message):
  with pytest.raises(UserError) as caught:
    parse_source(word)
  assert message in str(caught.value)


def test_the_corpus_is_the_source_where_there_are_no_others():
  assert DataConfig().parts == (SourceConfig("sotu_1790_1870"),)
  assert [part.weight for part in DataConfig(sources=("a/,weight=2", "b/")).parts] == [2.0, 1.0]


def test_the_same_source_twice_is_refused():
  with pytest.raises(UserError, match="'a/,weight=3' twice; name it once"):
    DataConfig(sources=("a/", "a/,weight=3"))


def test_a_corpus_beside_sources_is_refused(tiny_corpus):
  with pytest.raises(UserError, match="corpus is 'tiny' beside sources"):
    DataConfig(corpus="tiny", sources=("a/",))
