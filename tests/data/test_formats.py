"""Every format gives the documents that were written, and what is odd is handled and counted."""

import os

import numpy as np
import pytest
from data.texts import TEXTS, WRITERS, decoded, example, json_lines, prepared, write_tfrecord

from moe_jax.data import formats
from moe_jax.data.splits import Split, split_of
from moe_jax.errors import UserError

HELDOUT = [text for i, text in enumerate(TEXTS) if split_of(i) == Split.HELDOUT]
TRAIN = [text for i, text in enumerate(TEXTS) if split_of(i) == Split.TRAIN]


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "in").mkdir()
  return tmp_path / "in"


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_gives_its_documents(folder, tmp_path, name):
  WRITERS[name](folder / name, TEXTS)
  data = prepared(folder / name, tmp_path)
  assert decoded(data) == TRAIN
  assert decoded(data, Split.HELDOUT) == HELDOUT
  assert data.heldout_text == "\n".join(HELDOUT).encode()


def test_text_files_are_documents_in_the_order_of_their_names(folder, tmp_path):
  for i, text in enumerate(TEXTS):
    (folder / f"{i % 2}").mkdir(exist_ok=True)
    (folder / f"{i % 2}" / f"{i:02d}.txt").write_text(text)
  (folder / "README.md").write_text("not read")
  data = prepared(f"{folder}/", tmp_path)
  order = [*TEXTS[::2], *TEXTS[1::2]]
  assert decoded(data) == [text for i, text in enumerate(order) if split_of(i) == Split.TRAIN]
  assert data.sources[0].manifest.met.ignored_files == 1


def test_lines_are_documents_where_that_is_asked_for(folder, tmp_path):
  (folder / "a.txt").write_text("\n".join(f"line {i}" for i in range(20)) + "\r\n\nlast")
  data = prepared(f"{folder}/*.txt,documents=line", tmp_path)
  assert decoded(data)[-2:] == ["line 19", "last"]
  assert decoded(data, Split.HELDOUT) == ["line 15"]
  assert data.sources[0].manifest.met.empty_documents == 1


def test_a_glob_takes_what_it_names(folder, tmp_path):
  (folder / "a.jsonl").write_bytes(json_lines(TEXTS))
  (folder / "b.jsonl").write_bytes(json_lines(["other"]))
  assert "other" not in decoded(prepared(f"{folder}/a*.jsonl", tmp_path))


@pytest.mark.parametrize("size", [5, 64, 1000])
def test_a_document_longer_than_what_is_read_at_once_is_one_document(
  folder, tmp_path, monkeypatch, size
):
  monkeypatch.setattr(formats, "STRETCH_BYTES", size)
  long = "naïve — 你好 🙂\n" * 40 + "你" * 100
  texts = [*TEXTS[:20], long]
  for i, text in enumerate(texts):
    (folder / f"{i:02d}.txt").write_text(text)
  data = prepared(f"{folder}/", tmp_path)
  assert decoded(data)[-1] == long
  met = data.sources[0].manifest.met
  assert met.documents == 21 and met.repaired_documents == 0
  assert met.longer_than_context == sum(len(text.encode()) > 16 for text in texts)


def test_odd_text_is_kept_repaired_and_counted(folder, tmp_path):
  odd = [b"", b"a\xffb\xc3", b"nul\0nul\0", b"\xef\xbb\xbfbom", b"", b"\xed\xa0\x80"]
  for i, text in enumerate([*odd, *(text.encode() for text in TEXTS)]):
    (folder / f"{i:02d}.txt").write_bytes(text)
  data = prepared(f"{folder}/", tmp_path)
  assert decoded(data)[:4] == ["a\ufffdb\ufffd", "nul\0nul\0", "\ufeffbom", "\ufffd" * 3]
  met = data.sources[0].manifest.met
  assert (met.documents, met.empty_documents) == (len(TEXTS) + 4, 2)
  assert (met.repaired_documents, met.nul_bytes) == (2, 2)
  assert met.bytes == sum(data.text_bytes.values())


def test_odd_json_is_kept_repaired_and_counted(folder, tmp_path):
  lines = [
    b'{"text": "a\\ud800b"}',
    b'{"text": "c\xffd"}',
    b'{"text": null}',
    b"  ",
    b'{"text":""}',
  ]
  (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n" + json_lines(TEXTS))
  data = prepared(folder / "a.jsonl", tmp_path)
  assert decoded(data)[:2] == ["a\ufffd\ufffd\ufffdb", "c\ufffdd"]
  met = data.sources[0].manifest.met
  assert (met.repaired_documents, met.empty_documents) == (2, 3)


def test_a_line_of_ten_megabytes_is_one_document(folder, tmp_path):
  long = "ten megabytes " * 750_000
  (folder / "a.jsonl").write_bytes(json_lines([long, *TEXTS]))
  data = prepared(folder / "a.jsonl", tmp_path, length=1 << 18)
  stream = np.concatenate([record["targets"] for record in data.train])
  assert (
    stream[: len(long)].astype(np.uint8).tobytes()
    == (np.frombuffer(long.encode(), np.uint8) + 3).tobytes()
  )
  assert stream[len(long)] == data.tokenizer.eos_id


BAD = {
  "empty.jsonl": (b"", "is empty; download or write it again, or delete it"),
  "empty.parquet": (b"", "is empty"),
  "empty.array_record": (b"", "is empty"),
  "a.parquet": (b"no parquet" * 20, "is damaged or no .parquet file"),
  "a.array_record": (b"no records" * 20, "is damaged or no .array_record file"),
  "a.tfrecord": (b"no records" * 20, "is damaged or no .tfrecord file (no whole record at byte 0)"),
  "a.jsonl": (b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2 is no JSON"),
  "b.jsonl": (b"[" * 5000 + b"\n", "b.jsonl, line 1 is no JSON"),
  "c.jsonl": (b'{"content": "x"}\n', "has no field 'text'; expected content (option text=FIELD"),
  "d.jsonl": (b'{"text": 3}\n', "has int in field 'text', expected text"),
  "e.jsonl": (b'["x"]\n', "line 1 is list, expected an object with field 'text'"),
  "a.jsonl.gz": (b"no gzip", "is damaged or no .jsonl file"),
  "b.jsonl.xz": (b"no xz", "is damaged or no .jsonl file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_what_mends_it(folder, tmp_path, name):
  content, message = BAD[name]
  (folder / name).write_bytes(content)
  with pytest.raises(UserError) as caught:
    prepared(f"{folder}/", tmp_path)
  assert message in str(caught.value) and str(folder / name) in str(caught.value)
  assert not list(tmp_path.glob("packed_text/*/manifest.json"))


def test_examples_without_the_text_are_named(folder, tmp_path):
  write_tfrecord(folder / "a.tfrecord", [example("x", "content")])
  with pytest.raises(UserError, match="record 1 has no field 'text'; expected content"):
    prepared(f"{folder}/", tmp_path)
  write_tfrecord(folder / "a.tfrecord", [b"\xff\xff"])
  with pytest.raises(UserError, match=r"record 1 is no tf.train.Example"):
    prepared(f"{folder}/", tmp_path)


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("nowhere/", "source .* has no files; give an existing folder, file or glob"),
    ("a.csv", "a.csv has a suffix of no known format; expected .txt, .jsonl"),
    ("", "has 1 files and none of a known format"),
    ("*.txt", "has no files"),
  ],
)
def test_a_source_without_files_is_named(folder, tmp_path, source, message):
  (folder / "a.csv").write_text("a,b\n")
  with pytest.raises(UserError, match=message):
    prepared(f"{folder}/{source}", tmp_path)


def test_a_pipe_and_a_circle_of_links_end(folder, tmp_path):
  os.mkfifo(folder / "pipe.txt")
  (folder / "circle").symlink_to(folder)
  (folder / "a.jsonl").write_bytes(json_lines(TEXTS))
  assert decoded(prepared(f"{folder}/", tmp_path)) == TRAIN


def test_a_bucket_without_its_client_is_one_sentence(tmp_path):
  pytest.importorskip("etils")
  try:
    import gcsfs  # noqa: F401
  except ImportError:
    with pytest.raises(UserError, match=r"needs the package gcsfs.*pip install 'moe_jax\[gcs\]'"):
      prepared("gs://bucket/texts/", tmp_path)


def test_one_text_file_tells_how_lines_become_documents(folder, tmp_path):
  (folder / "a.txt").write_text("one\ntwo\n")
  with pytest.raises(UserError, match="1 documents with text; at least 16 .*documents=line"):
    prepared(folder / "a.txt", tmp_path)


def test_a_thousand_files_are_read(folder, tmp_path):
  # More than the usual limit of open files, had one stayed open for each.
  for i in range(1100):
    (folder / f"{i}.txt").write_bytes(b"text")
  data = prepared(f"{folder}/", tmp_path)
  assert data.sources[0].manifest.met.documents == 1100
