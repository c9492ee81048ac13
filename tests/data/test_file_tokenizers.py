"""Tokenizers in files train, load, prepare data, and are refused in one sentence."""

import json

import numpy as np
import pytest
import tokenizers
from data.texts import TEXTS, json_lines

from moe_jax.cli import main
from moe_jax.data.builders import prepare
from moe_jax.data.config import DataConfig
from moe_jax.data.sources import parse_source
from moe_jax.data.tokenizer_training import train_sentencepiece
from moe_jax.data.tokenizers import get_tokenizer
from moe_jax.errors import UserError

ODD = ["", " leading and  double spaces ", "line\nline\n\n\ttab\r\n", "naïve — 你好 🙂", "nul\0nul"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "small.model"
  # Of the bundled addresses: too small a text has too few pieces.
  train_sentencepiece([parse_source("sotu_1790_1870")], path, vocab_size=400, text_bytes=60_000)
  return path


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
  folder = tmp_path_factory.mktemp("json")
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<|endoftext|>", "<begin>"],
    initial_alphabet=alphabet,
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS, trainer)
  tokenizer.enable_truncation(4)
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["model", "tokenizer_json"])
def test_text_survives_a_round_trip(kind, request):
  tokenizer = get_tokenizer(str(request.getfixturevalue(kind)))
  for text in [*ODD, *TEXTS]:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and (ids < tokenizer.vocab_size).all()
    assert tokenizer.decode(ids) == text
    framed = [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id, 10**6]
    assert tokenizer.decode(framed) == text
  batch = tokenizer.encode_batch([text.encode() for text in [*ODD, *TEXTS]])
  for text, ids in zip([*ODD, *TEXTS], batch, strict=True):
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_a_trained_model_has_the_ids_of_bytes_for_what_frames_documents(model):
  tokenizer = get_tokenizer(str(model))
  assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
  assert tokenizer.vocab_size == 400
  assert len(tokenizer.encode("the government of the United States")) < 25


def test_settings_beside_a_tokenizer_json_name_what_frames_documents(tokenizer_json):
  plain = get_tokenizer(str(tokenizer_json))
  assert plain.bos_id == plain.eos_id == plain.pad_id == 0
  settings = tokenizer_json.with_name("tokenizer_config.json")
  settings.write_text(json.dumps({"bos_token": {"content": "<begin>"}}))
  copy = tokenizer_json.with_name("copy.json")
  copy.write_bytes(tokenizer_json.read_bytes())
  named = get_tokenizer(str(copy))
  assert (named.bos_id, named.eos_id) == (1, 0) and named.digest != plain.digest
  settings.unlink()


@pytest.mark.parametrize("kind", ["model", "tokenizer_json"])
def test_data_are_prepared_with_it(kind, request, tmp_path):
  path = request.getfixturevalue(kind)
  (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
  config = DataConfig(
    sources=(str(tmp_path / "a.jsonl"),),
    tokenizer=str(path),
    sequence_length=16,
    data_dir=str(tmp_path),
  )
  data = prepare(config)
  tokenizer = data.tokenizer
  want = [t for i in (15, 31) for t in [*tokenizer.encode(TEXTS[i]), tokenizer.eos_id]]
  found = np.concatenate([r["targets"][r["loss_mask"] == 1] for r in data.heldout])
  np.testing.assert_array_equal(found, want)
  assert data.heldout_bytes == sum(len(TEXTS[i].encode()) for i in (15, 31))


def test_the_command_trains_a_model_that_train_takes(tmp_path, capsys):
  out = tmp_path / "new" / "c.model"
  words = ["--config=configs/quickstart.py", f"--config.data.tokenizer={out}"]
  command = ["data", "train-tokenizer", *words, f"--out={out}"]
  assert main([*command, "--vocab_size=360", "--megabytes=1"]) == 0
  assert "360 ids, bpe" in capsys.readouterr().out
  assert get_tokenizer(str(out)).vocab_size == 360
  assert main([*command, "--vocab_size=256"]) == main([*command, "--kind=bpee"]) == 2
  said = capsys.readouterr().err
  assert "give more than 260" in said and "did you mean 'bpe'?" in said


@pytest.mark.parametrize("size", [262, 30000])
def test_a_vocabulary_that_the_text_does_not_give_is_refused(tmp_path, size):
  (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
  with pytest.raises(
    UserError, match=f"no vocabulary of {size} ids can be learned.*ocabulary size"
  ):
    train_sentencepiece(
      [parse_source(f"{tmp_path}/a.jsonl")], tmp_path / "a.model", vocab_size=size
    )
  assert not (tmp_path / "a.model").exists()


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("absent.model", None, "cannot be read .*moe-jax data train-tokenizer --out=FILE.model"),
    ("bad.model", b"no model", "is damaged or no SentencePiece model"),
    ("tokenizer.json", b"{", "cannot be read"),
    ("tokenizer.txt", b"", "unknown tokenizer .* or the path of a SentencePiece .model"),
  ],
)
def test_a_bad_tokenizer_is_named(tmp_path, name, content, message):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=message):
    DataConfig(tokenizer=str(path))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(UserError, match="has no token for the end of a document"):
    get_tokenizer(str(tmp_path / "tokenizer.json"))
