"""A checkpoint with a SentencePiece model alone: ids, text, beginnings, added tokens, faults."""

import io
import json
import sys

import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from sentencepiece import SentencePieceTrainer

from moe_jax.cli import main
from moe_jax.convert.hub_tokenizer import HubTokenizer
from moe_jax.errors import UserError

TEXT = ["a cab fed a bad cafe", "a bad face faced a bed", "feed a bee a cab"]


def train(**settings) -> bytes:
  """A model of 16 pieces: <unk>, <s>, </s>, the letters a to f with the space, and six pairs."""
  out = io.BytesIO()
  SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT),
    model_writer=out,
    num_threads=1,
    minloglevel=2,
    **dict(
      vocab_size=16,
      model_type="bpe",
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
    )
    | settings,
  )
  return out.getvalue()


@pytest.fixture(scope="module")
def letters():
  return train()


@pytest.fixture
def folder(checkpoint, letters):
  (checkpoint / "tokenizer.model").write_bytes(letters)
  return checkpoint


def write(folder, name, **settings):
  path = folder / name
  given = json.loads(path.read_text()) if path.is_file() else {}
  path.write_text(json.dumps(given | settings))


def test_a_text_comes_back_and_words_keep_their_space(folder):
  tokenizer = HubTokenizer(folder)
  ids = tokenizer.encode("a cab")
  assert ids[0] == 1 and ids.dtype == np.int32 and 0 not in ids
  for text in ("a cab", " bad  cafe ", "", "face"):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.decode_after(ids, tokenizer.encode("bed")[1:]) == " bed"


def test_bytes_stand_in_for_letters_that_the_model_lacks(checkpoint):
  (checkpoint / "tokenizer.model").write_bytes(train(byte_fallback=True, vocab_size=270))
  write(checkpoint, "config.json", vocab_size=270)
  tokenizer = HubTokenizer(checkpoint)
  ids = tokenizer.encode("a é\n🙂")
  # Two bytes, one and four.
  assert sum(3 <= each < 259 for each in ids) == 7
  assert tokenizer.decode(ids) == "a é\n🙂"
  assert tokenizer.decode_after(ids[:-2], ids[-2:]) == "�" * 2
  assert tokenizer.decode(ids[:-1]).startswith("a é\n�")


def test_special_unknown_and_absent_ids_have_no_text(folder):
  ids = [1, *HubTokenizer(folder).encode("cab")[1:], 0, 2, 16, 99, -1]
  assert HubTokenizer(folder).decode(np.asarray(ids)) == "cab"


@pytest.mark.parametrize(
  "settings, first",
  [
    ({}, 1),
    ({"add_bos_token": True, "bos_token": "</s>"}, 2),
    ({"bos_token": {"content": "</s>", "lstrip": False}}, 2),
    ({"add_bos_token": False, "bos_token": "<s>"}, None),
  ],
)
def test_a_text_begins_as_the_settings_of_the_tokenizer_say(folder, settings, first):
  plain = HubTokenizer(folder).encode("a cab")[1:].tolist()
  write(folder, "tokenizer_config.json", **settings)
  expected = plain if first is None else [first, *plain]
  assert HubTokenizer(folder).encode("a cab").tolist() == expected


def test_a_text_begins_as_the_settings_of_the_model_say_where_its_own_are_silent(folder):
  write(folder, "config.json", bos_token_id=2)
  assert HubTokenizer(folder).encode("a")[0] == 2


def test_a_model_without_a_beginning_has_none(checkpoint):
  (checkpoint / "tokenizer.model").write_bytes(train(bos_id=-1, vocab_size=15))
  with pytest.raises(UserError, match="the prompt '' has no token"):
    HubTokenizer(checkpoint).encode("")


def test_added_tokens_are_found_before_pieces_and_special_ones_have_no_text(folder):
  entry = {"content": "<|user|>", "special": True, "rstrip": True}
  table = {"16": entry, "17": {"content": "<|user|>s", "special": False}}
  write(folder, "tokenizer_config.json", added_tokens_decoder=table, add_bos_token=False)
  write(folder, "added_tokens.json", **{"<pad>": 18})
  tokenizer = HubTokenizer(folder)
  a = tokenizer.encode("a").tolist()
  spaced = tokenizer.encode("a a")[len(a) :].tolist()
  assert tokenizer.encode("a<|user|>s a<|user|> \n<s><pad>").tolist() == [
    *(*a, 17, *spaced, 16, 1, 18)
  ]
  assert tokenizer.decode(np.asarray([*a, 17, *spaced, 16, 1, 18])) == "a<|user|>s a"


@pytest.mark.parametrize("legacy, pieces", [(False, ["a"]), (True, ["▁a"])])
def test_older_releases_begin_text_after_an_added_token_with_a_space(folder, legacy, pieces):
  write(folder, "tokenizer_config.json", legacy=legacy)
  tokenizer = HubTokenizer(folder)
  after = tokenizer.encode("</s>a").tolist()[2:]
  assert [tokenizer._tokenizer._first.id_to_piece(each) for each in after] == pieces


def test_generate_reads_the_model(folder, capsys):
  write(folder, "config.json", eos_token_id=2)
  command = ["generate", f"--checkpoint={folder}", "--prompt=a cab", "--max_new_tokens=0"]
  assert main(command) == 0
  assert capsys.readouterr().out == "a cab\n"


def damage(folder, monkeypatch):
  path = folder / "tokenizer.model"
  path.write_bytes(path.read_bytes()[:-3])


def write_tiktoken(folder, monkeypatch):
  (folder / "tokenizer.model").write_bytes(b"YQ== 0\nYg== 1\n")


def uninstall(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, "sentencepiece", None)


def tokenizer_config(**settings):
  return lambda folder, _: write(folder, "tokenizer_config.json", **settings)


FAULTS = [
  (damage, "tokenizer.model is damaged or no SentencePiece model"),
  (write_tiktoken, "tokenizer.model is damaged or no SentencePiece model"),
  (uninstall, "needs the package sentencepiece, which is not installed: pip install 'moe_jax[hf]'"),
  (lambda folder, _: write(folder, "config.json", vocab_size=15), "16 ids and config.json vocab_"),
  (lambda folder, _: write(folder, "config.json", bos_token_id=[1]), "bos_token_id = [1]"),
  (tokenizer_config(add_bos_token="no"), 'add_bos_token = "no"; expected true or false'),
  (tokenizer_config(bos_token="<begin>"), 'bos_token = "<begin>"; expected a token that'),
  (tokenizer_config(bos_token=1), "bos_token = 1; expected the text of a token"),
  (tokenizer_config(added_tokens_decoder={"16": "<pad>"}), "tokenizer_config.json is damaged"),
  (lambda folder, _: write(folder, "added_tokens.json", pad="16"), "added_tokens.json is damaged"),
]


@pytest.mark.parametrize("fault, message", FAULTS)
def test_what_is_missing_or_damaged_is_said_in_one_sentence(
  fault, message, folder, monkeypatch, capfd
):
  fault(folder, monkeypatch)
  assert main(["generate", f"--checkpoint={folder}", "--prompt=a"]) == 2
  error = capfd.readouterr().err
  assert message in error and error.count("\n") == 1
