"""The tokenizer of a checkpoint of the hub, `tokenizer.json`, read by the `tokenizers` library."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.convert.hub_config import read_hub_config
from moe_jax.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
_GENERATION_FILE = "generation_config.json"
_SENTENCEPIECE_FILE = "tokenizer.model"


class HubTokenizer:
  """Text to ids and back, as the checkpoint's own tokenizer does it.

  Attributes:
    stop_ids: the ids that end a text; `generation_config.json` has the last word, `config.json` the
      one before. None of them if neither names any.
  """

  def __init__(self, folder: str | Path):
    """Reads a folder.

    Raises:
      UserError: it has no `tokenizer.json` or a damaged one, or `tokenizers` is not installed.
    """
    folder = Path(folder)
    self._tokenizer = _read_tokenizer(folder)
    self.stop_ids = _read_stop_ids(folder)

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of a prompt, (L,) int32, begun as the model was trained to see texts begin.

    Raises:
      UserError: no id comes out, as of an empty text where nothing marks the beginning.
    """
    ids = self._tokenizer.encode(text).ids
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
    before = self.decode(prompt)
    return self.decode(np.concatenate([prompt, new])).removeprefix(before)


def _read_tokenizer(folder: Path) -> Any:
  path = folder / TOKENIZER_FILE
  if not path.is_file():
    kind = ""
    if (folder / _SENTENCEPIECE_FILE).is_file():
      kind = f", only the SentencePiece file {_SENTENCEPIECE_FILE}, which is not supported"
    raise UserError(
      f"{folder} has no {TOKENIZER_FILE}{kind}; expected the one that transformers saves with"
      " AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
    )
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


def _read_stop_ids(folder: Path) -> tuple[int, ...]:
  given = _read_generation(folder / _GENERATION_FILE).get("eos_token_id")
  if given is None:
    given = read_hub_config(folder).get("eos_token_id", [])
  ids = given if isinstance(given, list) else [given]
  if not all(type(each) is int for each in ids):
    raise UserError(
      f"{folder} has eos_token_id = {json.dumps(given)}; expected an id or a list of ids"
    )
  return tuple(ids)


def _read_generation(path: Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path} is not valid JSON ({error}); save or download it again") from None
  if not isinstance(values, dict):
    raise UserError(f"{path} holds {type(values).__name__}; expected the settings of generation")
  return values
