"""The tokenizer of a checkpoint of the hub: `tokenizer.json`, or else a SentencePiece model."""

import json
import math
from pathlib import Path
from typing import Protocol

import numpy as np

from moe_jax.choices import is_utf8
from moe_jax.convert.hub_config import CONFIG_FILE, HubConfig, read_hub_config, read_object
from moe_jax.convert.sentencepiece_tokenizer import SENTENCEPIECE_FILE, SentencePieceTokenizer
from moe_jax.data.tokenizer_files import load_tokenizer_json
from moe_jax.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
_GENERATION_FILE = "generation_config.json"


class _Tokenizer(Protocol):
  num_pieces: int

  def encode(self, text: str) -> list[int]: ...

  def decode(self, ids: list[int]) -> str: ...


class HubTokenizer:
  """Text to ids and back, as the checkpoint's own tokenizer does it.

  Attributes:
    stop_ids: the ids that end a text; `generation_config.json` has the last word, `config.json` the
      one before. None of them if neither names any.
  """

  def __init__(self, folder: str | Path):
    """Reads a folder.

    Raises:
      UserError: it has neither `tokenizer.json` nor `tokenizer.model`, a damaged one, or one with
        more ids than its model; or the library that reads it is not installed.
    """
    folder = Path(folder)
    hub = read_hub_config(folder)
    self._tokenizer = _read_tokenizer(folder)
    vocab_size = _vocab_size(hub)
    if self._tokenizer.num_pieces > vocab_size:
      raise UserError(
        f"the tokenizer of {folder} has {self._tokenizer.num_pieces} ids and {CONFIG_FILE}"
        f" vocab_size = {vocab_size}; expected the tokenizer of this model"
      )
    self.stop_ids = _read_stop_ids(folder, hub, vocab_size)

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of a prompt, (L,) int32, begun as the model was trained to see texts begin.

    Raises:
      UserError: no id comes out, as of an empty text where nothing marks the beginning, or the text
        is one that UTF-8 cannot encode.
    """
    if not is_utf8(text):
      raise UserError(f"the prompt {text!r} is not UTF-8 text; expected no lone surrogates")
    ids = self._tokenizer.encode(text)
    if not ids:
      raise UserError(f"the prompt {text!r} has no token; expected at least one")
    return np.asarray(ids, np.int32)

  def decode(self, ids: np.ndarray) -> str:
    """Returns the text of the ids; special ones, and those it does not know, are skipped."""
    return self._tokenizer.decode(np.asarray(ids).tolist())

  def decode_after(self, prompt: np.ndarray, new: np.ndarray) -> str:
    """Returns the text that `new` ids add to that of `prompt`.

    Decoded alone, their first word would lose its space under many tokenizers.
    """
    before, after = self.decode(prompt), self.decode(np.concatenate([prompt, new]))
    # Bytes that are no UTF-8 can make the prompt's own bytes before them unreadable.
    return after.removeprefix(before) if after.startswith(before) else self.decode(new)


class _JsonTokenizer:
  """What `tokenizer.json` describes."""

  def __init__(self, path: Path):
    self._tokenizer = load_tokenizer_json(path)
    self.num_pieces = self._tokenizer.get_vocab_size(with_added_tokens=False)

  def encode(self, text: str) -> list[int]:
    return self._tokenizer.encode(text).ids

  def decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids)


def _read_tokenizer(folder: Path) -> _Tokenizer:
  if (folder / TOKENIZER_FILE).is_file():
    return _JsonTokenizer(folder / TOKENIZER_FILE)
  if (folder / SENTENCEPIECE_FILE).is_file():
    return SentencePieceTokenizer(folder)
  raise UserError(
    f"{folder} has neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE}; expected what transformers"
    " saves with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
  )


def _vocab_size(hub: HubConfig) -> int | float:
  size = hub.get("vocab_size", hub.section("text_config").get("vocab_size", None))
  # Where there is none, that is said with the model's other faults.
  return math.inf if size is None else size


def _read_stop_ids(folder: Path, hub: HubConfig, vocab_size: int | float) -> tuple[int, ...]:
  given = read_object(folder / _GENERATION_FILE).get("eos_token_id")
  if given is None:
    given = hub.get("eos_token_id", [])
  ids = given if isinstance(given, list) else [given]
  if not all(type(each) is int and 0 <= each < vocab_size for each in ids):
    raise UserError(
      f"{folder} has eos_token_id = {json.dumps(given)}; expected an id of the vocabulary or a"
      " list of ids"
    )
  return tuple(ids)
