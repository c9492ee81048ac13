"""Prepared data equal the packed documents, and survive races, kills and bad directories."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.data.builders import prepare
from moe_jax.data.config import DataConfig
from moe_jax.data.corpus import split_documents
from moe_jax.data.ingest import Ingest
from moe_jax.data.packing import FIELDS, Packer, SpecialIds
from moe_jax.data.splits import Split
from moe_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]

# Prepares a corpus of 64 documents under the directory argv[1]; argv[2] says what happens at the
# 40th document of the training split: "kill" ends the process as the kernel would.
CHILD = """
import os, signal, sys
from moe_jax.data.builders import prepare
from moe_jax.data.config import DataConfig
from moe_jax.data.corpus import Document, register_corpus

class Numbers:
  name, digest, passes = "numbers", "numbers-1", 0
  def documents(self):
    self.passes += 1
    for i in range(64):
      if sys.argv[2] == "kill" and i == 40:
        os.kill(os.getpid(), signal.SIGKILL)
      yield Document(f"{i} " * 50)

register_corpus(Numbers())
data = prepare(DataConfig(corpus="numbers", sequence_length=8, data_dir=sys.argv[1]))
tokens = [int(data.train[i]["tokens"].sum()) for i in range(len(data.train))]
print(len(tokens), sum(tokens), data.heldout_bytes, "tensorflow" in sys.modules)
"""


def _child(folder, behaviour):
  command = [sys.executable, "-c", CHILD, str(folder), behaviour]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  pipe = subprocess.PIPE
  return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def _config(corpus, folder, length=16):
  return DataConfig(corpus=corpus.name, sequence_length=length, data_dir=str(folder))


def test_prepared_records_are_the_packed_documents(tiny_corpus, tmp_path):
  data = prepare(_config(tiny_corpus, tmp_path))
  tokenizer = data.tokenizer
  special = SpecialIds(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
  for split, source in ((Split.TRAIN, data.train), (Split.HELDOUT, data.heldout)):
    packer = Packer(16, special)
    documents = split_documents(tiny_corpus, split)
    want = list(packer.pack(tokenizer.encode(d.text) for d in documents))
    assert len(source) == len(want) and data.counts[split] == packer.counts
    for index, record in enumerate(want):
      found = source[index]
      for name in FIELDS:
        assert found[name].dtype == np.int32
        np.testing.assert_array_equal(found[name], record[name])


def test_bits_per_byte_have_the_bytes_of_the_heldout_documents(tiny_corpus, tmp_path):
  data = prepare(_config(tiny_corpus, tmp_path))
  texts = [tiny_corpus.texts[i].encode() for i in (15, 31)]
  assert data.heldout_text == b"\n".join(texts)
  assert data.heldout_bytes == sum(len(text) for text in texts)
  # One id a byte, and the eos of each document.
  assert data.counts[Split.HELDOUT].target_tokens == data.heldout_bytes + len(texts)
  assert len(data.train_text.split(b"\n")) == 38
  assert data.vocab_size == 259


def test_prepared_data_are_read_not_made_again(tiny_corpus, tmp_path, monkeypatch):
  first = prepare(_config(tiny_corpus, tmp_path))
  monkeypatch.setattr(Ingest, "run", lambda *_: pytest.fail("made again"))
  again = prepare(_config(tiny_corpus, tmp_path))
  assert again.fingerprint == first.fingerprint and again.counts == first.counts
  np.testing.assert_array_equal(again.train[3]["tokens"], first.train[3]["tokens"])


def test_nothing_is_printed_without_a_terminal(tiny_corpus, tmp_path, capfd):
  prepare(_config(tiny_corpus, tmp_path))
  assert capfd.readouterr() == ("", "")


def test_the_bundled_corpus_decodes_to_its_own_heldout_text(tmp_path):
  # Long records: a quarter of the preparation time of the default length.
  data = prepare(DataConfig(sequence_length=2048, data_dir=str(tmp_path)))
  stream = np.concatenate([data.heldout[i]["tokens"] for i in range(len(data.heldout))])
  assert data.tokenizer.decode(stream).encode() == data.heldout_text.replace(b"\n", b"")
  assert data.heldout_bytes == 224_073 and data.counts[Split.HELDOUT].documents == 5
  assert data.counts[Split.TRAIN].documents == 76


def test_the_standard_directory_honours_the_environment(tiny_corpus, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  prepare(_config(tiny_corpus, ""))
  assert list((tmp_path / "packed_text").glob("tiny-bytes-16-*"))


def test_two_processes_at_once_make_one_data_set_without_tensorflow(tmp_path):
  children = [_child(tmp_path, "finish") for _ in range(2)]
  outputs = [child.communicate(timeout=60) for child in children]
  assert [child.returncode for child in children] == [0, 0], outputs
  assert outputs[0] == outputs[1]
  assert outputs[0][0].split()[-1] == "False"
  assert len(list(tmp_path.glob("packed_text/*/manifest.json"))) == 1


def test_a_killed_preparation_is_never_read(tmp_path):
  killed = _child(tmp_path, "kill")
  killed.communicate(timeout=60)
  assert killed.returncode == -signal.SIGKILL
  assert list(tmp_path.glob("packed_text/*/lock"))
  assert not list(tmp_path.glob("packed_text/*/manifest.json"))
  after, _ = _child(tmp_path, "finish").communicate(timeout=60)
  clean, _ = _child(tmp_path / "clean", "finish").communicate(timeout=60)
  assert after and after == clean
  assert not list(tmp_path.glob("packed_text/*/*.partial"))


@pytest.mark.parametrize("name", ["train-*", "heldout-*", "train.txt"])
def test_prepared_data_that_lost_a_file_are_refused(tiny_corpus, tmp_path, name):
  config = _config(tiny_corpus, tmp_path)
  prepare(config)
  (lost,) = tmp_path.glob(f"packed_text/*/{name}")
  lost.unlink()
  with pytest.raises(UserError, match=r"are damaged .* delete that folder"):
    prepare(config)


@pytest.mark.parametrize("content", ["", "{", "{}", "null", "[]"])
def test_prepared_data_that_no_longer_describe_themselves_are_refused(
  tiny_corpus, tmp_path, content
):
  config = _config(tiny_corpus, tmp_path)
  prepare(config)
  (file,) = tmp_path.glob("packed_text/*/manifest.json")
  file.write_text(content)
  with pytest.raises(UserError, match="are damaged .* delete that folder") as caught:
    prepare(config)
  assert repr(str(file.parent)) in str(caught.value)


def test_a_number_changed_in_the_manifest_is_found(tiny_corpus, tmp_path):
  config = _config(tiny_corpus, tmp_path)
  prepare(config)
  (file,) = tmp_path.glob("packed_text/*/manifest.json")
  file.write_text(file.read_text().replace('"documents": 38', '"documents": 39'))
  with pytest.raises(UserError, match="its checksum does not fit"):
    prepare(config)


def test_a_bucket_in_the_environment_is_refused(tiny_corpus, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket")
  with pytest.raises(UserError, match="'gs://bucket', but must be a local folder"):
    prepare(_config(tiny_corpus, ""))


@pytest.mark.parametrize("size", [0, 1000, 65536])
def test_prepared_data_cut_short_are_refused(tiny_corpus, tmp_path, size):
  config = _config(tiny_corpus, tmp_path)
  prepare(config)
  (cut,) = tmp_path.glob("packed_text/*/train-*")
  os.truncate(cut, size)
  with pytest.raises(UserError, match="are damaged"):
    prepare(config)


def test_a_data_dir_that_cannot_be_written_is_named(tiny_corpus, tmp_path):
  (tmp_path / "file").write_text("not a folder")
  with pytest.raises(UserError, match=r"cannot write prepared data to data_dir '.*file/x'"):
    prepare(_config(tiny_corpus, tmp_path / "file" / "x"))


def test_a_corpus_without_heldout_documents_is_refused(short_corpus, tmp_path):
  with pytest.raises(UserError, match="'short' has 2 documents with text; at least 16 are"):
    prepare(_config(short_corpus, tmp_path))
  assert not list(tmp_path.glob("packed_text/*/manifest.json"))


def test_the_fingerprint_follows_the_records_not_the_place(tiny_corpus, tmp_path):
  base = prepare(_config(tiny_corpus, tmp_path)).fingerprint
  assert base == prepare(_config(tiny_corpus, tmp_path / "elsewhere")).fingerprint
  assert base != prepare(_config(tiny_corpus, tmp_path, length=17)).fingerprint
