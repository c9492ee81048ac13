"""Text to ids and back."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from moe_jax.choices import did_you_mean
from moe_jax.data.tokenizer_files import JsonTokenizer, SentencePieceModel
from moe_jax.errors import UserError


class Tokenizer(Protocol):
  """What packing, training and generation need of a tokenizer.

  Attributes:
    name: the value of `DataConfig.tokenizer`.
    digest: changes whenever the same text would get other ids.
    vocab_size: number of ids, special ones included.
    pad_id, bos_id, eos_id: the ids of padding, begin and end of a document.
  """

  name: str
  digest: str
  vocab_size: int
  pad_id: int
  bos_id: int
  eos_id: int

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns the ids of a text, (L,) int32, without bos and eos."""

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """Returns for each text in UTF-8 the ids that `encode` gives, of any integer type."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids, special ids skipped."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """Maps byte b to id b + 3; ids 0, 1 and 2 are pad, bos and eos.

  Lossless for every input: `decode(encode(text)) == text` for any `str` that UTF-8 can encode.
  """

  name: str = "bytes"
  digest: str = "bytes+3"
  vocab_size: int = 259
  pad_id: int = 0
  bos_id: int = 1
  eos_id: int = 2

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns one id a byte, (L,) int32; a `str` is encoded as UTF-8 first."""
    data = text.encode() if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.int32) + _FIRST_BYTE_ID

  def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """Returns one id a byte of each text, uint16."""
    return [np.frombuffer(text, np.uint8) + np.uint16(_FIRST_BYTE_ID) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids.

    Ids that are no byte (special ones, and any from `vocab_size` up, which a model with a padded
    vocabulary can emit) are skipped; bytes that are no UTF-8 become U+FFFD.
    """
    values = np.asarray(ids if hasattr(ids, "__len__") else list(ids), np.int64).reshape(-1)
    is_byte = (values >= _FIRST_BYTE_ID) & (values < self.vocab_size)
    data = (values[is_byte] - _FIRST_BYTE_ID).astype(np.uint8).tobytes()
    return data.decode(errors="replace")


_FIRST_BYTE_ID = 3
_BYTES = "bytes"
_SUFFIXES = {".model": SentencePieceModel, ".json": JsonTokenizer}


def get_tokenizer(name: str) -> Tokenizer:
  """Returns the tokenizer called `name`: `bytes`, or the path of a `.model` or `tokenizer.json`.

  Raises:
    UserError: neither of them, or a file that cannot be read.
  """
  if name == _BYTES:
    return ByteTokenizer()
  suffix = os.path.splitext(str(name))[1]
  if suffix not in _SUFFIXES:
    raise UserError(
      f"unknown tokenizer {name!r}; {did_you_mean(str(name), [_BYTES])}, or the path of a"
      " SentencePiece .model or a tokenizer.json"
    )
  path = os.path.expanduser(name)
  try:
    written = os.stat(path).st_mtime_ns
  except OSError:
    written = 0
  return _read(path, written)


@functools.lru_cache(maxsize=8)
def _read(path: str, written: int) -> Tokenizer:
  """Reads a file once, and again when it has been written since: large ones take a second."""
  del written
  return _SUFFIXES[os.path.splitext(path)[1]](path)
