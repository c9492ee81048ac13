"""Tokenizers that lie in files: SentencePiece models and `tokenizer.json`.

Both need a package of the extra `hf`. Documents are framed by the special tokens that the file
names; a tokenizer without a token for the beginning has its end begin documents too, as GPT-2's
`<|endoftext|>` does, and one without padding pads by its end, which no loss sees.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import UserError

_SETTINGS_FILE = "tokenizer_config.json"
# Names that published files give to the special tokens, where no settings lie beside the file.
_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]", "<|startoftext|>")
_EOS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]", "<|im_end|>")
_PAD = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")


class SentencePieceModel:
  """A SentencePiece `.model` (arXiv 1808.06226); see `moe_jax.data.tokenizers.Tokenizer`."""

  def __init__(self, path: str):
    """Reads the file.

    Raises:
      UserError: it cannot be read, is no such model, or has no token for the end of a document.
    """
    data = read_bytes(path)
    self._model = load_sentencepiece(data, path)
    self.name, self.digest = path, "sentencepiece-" + hashlib.sha256(data).hexdigest()
    self.vocab_size = self._model.get_piece_size()
    self.pad_id, self.bos_id, self.eos_id = _framing(
      path, self._model.pad_id(), self._model.bos_id(), self._model.eos_id()
    )

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns the ids of a text, (L,) int32, without bos and eos."""
    return np.asarray(self._model.encode(_as_str(text)), np.int32)

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """Returns the ids of each text, on all cores."""
    ids = self._model.encode([_as_str(text) for text in texts])
    return [np.asarray(each, np.int32) for each in ids]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids; special ids, and those that are no token's, are skipped."""
    known = [int(i) for i in ids if 0 <= i < self.vocab_size]
    return self._model.decode([i for i in known if not self._is_special(i)])

  def _is_special(self, token: int) -> bool:
    return self._model.is_control(token) or self._model.is_unknown(token)


class JsonTokenizer:
  """A `tokenizer.json` of Hugging Face; see `moe_jax.data.tokenizers.Tokenizer`.

  Which tokens frame a document stands in `tokenizer_config.json` beside it, or else is told by the
  names that they have in published files.
  """

  def __init__(self, path: str):
    """Reads the file.

    Raises:
      UserError: it cannot be read, is none, or has no token for the end of a document.
    """
    data = read_bytes(path)
    self._tokenizer = load_tokenizer_json(Path(path))
    # Records of a fixed length are cut here, whatever the file says.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.name = path
    self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    settings = _settings(path)
    self.pad_id, self.bos_id, self.eos_id = _framing(
      path,
      self._special(settings, "pad_token", _PAD),
      self._special(settings, "bos_token", _BOS),
      self._special(settings, "eos_token", _EOS),
    )
    frame = f"{self.pad_id},{self.bos_id},{self.eos_id}".encode()
    self.digest = "tokenizer-" + hashlib.sha256(data + frame).hexdigest()

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns the ids of a text, (L,) int32, without bos and eos."""
    return np.asarray(self._tokenizer.encode(_as_str(text), add_special_tokens=False).ids, np.int32)

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """Returns the ids of each text, on all cores."""
    texts = [_as_str(text) for text in texts]
    found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(each.ids, np.int32) for each in found]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids; special ids, and those that are no token's, are skipped."""
    return self._tokenizer.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

  def _special(self, settings: dict[str, Any], kind: str, usual: Sequence[str]) -> int:
    """Returns the id of a special token, or -1."""
    given = settings.get(kind)
    text = given.get("content") if isinstance(given, dict) else given
    ids = [self._tokenizer.token_to_id(each) for each in ([text] if text else usual)]
    return next((each for each in ids if each is not None), -1)


def read_bytes(path: str) -> bytes:
  """Returns what a tokenizer's file holds; UserError if it cannot be read."""
  try:
    return Path(path).read_bytes()
  except OSError as error:
    raise UserError(
      f"the tokenizer {path} cannot be read ({error.strerror}); give the path of a .model or"
      " tokenizer.json, or make one with moe-jax data train-tokenizer --out=FILE.model"
    ) from None


def load_sentencepiece(data: bytes, path: str | Path) -> Any:
  """Returns the processor of a serialised SentencePiece model, read from `path`.

  Raises:
    UserError: the data are no such model, or `sentencepiece` is not installed.
  """
  try:
    from sentencepiece import SentencePieceProcessor
  except ImportError:
    raise UserError(
      f"reading {path} needs the package sentencepiece, which is not installed: pip install"
      " 'moe_jax[hf]'"
    ) from None
  processor = SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(data)
  # What the library says of a fault is a line of its own source.
  except RuntimeError:
    raise UserError(
      f"{path} is damaged or no SentencePiece model (tiktoken's files can have this name too);"
      " download it again, or expected a tokenizer.json"
    ) from None
  return processor


def load_tokenizer_json(path: Path) -> Any:
  """Returns the tokenizer of a `tokenizer.json`.

  Raises:
    UserError: the file is none, or `tokenizers` is not installed.
  """
  try:
    from tokenizers import Tokenizer
  except ImportError:
    raise UserError(
      f"reading {path} needs the package tokenizers, which is not installed: pip install"
      " 'moe_jax[hf]'"
    ) from None
  try:
    return Tokenizer.from_file(str(path))
  # The library raises plain Exception for every fault of the file.
  except Exception as error:
    raise UserError(f"{path} cannot be read ({error}); save or download it again") from None


def _settings(path: str) -> dict[str, Any]:
  file = Path(path).with_name(_SETTINGS_FILE)
  if not file.is_file():
    return {}
  try:
    settings = json.loads(file.read_bytes())
  except ValueError:
    settings = None
  if not isinstance(settings, dict):
    raise UserError(f"{file} is damaged, expected a JSON object; save or download it again")
  return settings


def _framing(path: str, pad: int, bos: int, eos: int) -> tuple[int, int, int]:
  if eos < 0:
    raise UserError(
      f"the tokenizer {path} has no token for the end of a document; expected one, such as </s>:"
      " train another, or name its eos_token in tokenizer_config.json"
    )
  return (pad if pad >= 0 else eos, bos if bos >= 0 else eos, eos)


def _as_str(text: str | bytes) -> str:
  return text if isinstance(text, str) else text.decode(errors="replace")
