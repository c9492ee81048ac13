"""The SentencePiece model of a checkpoint, `tokenizer.model`, with the settings that lie beside it.

The model itself (arXiv 1808.06226) is read and run by the `sentencepiece` library. What it does not
know stands in `tokenizer_config.json` and `added_tokens.json`: whether texts begin with a token of
their own, and which tokens were added later. Those are found in a text before anything else.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_jax.convert.hub_config import CONFIG_FILE, read_hub_config, read_object
from moe_jax.data.tokenizer_files import load_sentencepiece
from moe_jax.errors import UserError

SENTENCEPIECE_FILE = "tokenizer.model"
_SETTINGS_FILE = "tokenizer_config.json"
_ADDED_FILE = "added_tokens.json"
# Serialised messages merge when they are joined; this one is `normalizer_spec.add_dummy_prefix`,
# field 3 of field 3 of `ModelProto`, false. The library has no other way to set it.
_NO_PREFIX = b"\x1a\x02\x18\x00"


@dataclasses.dataclass(frozen=True)
class _Added:
  """A token that stands in a text as it is written.

  Attributes:
    id, text: of the token.
    special: it marks something and is left out of decoded text.
    lstrip, rstrip: it takes the white space before or after it.
  """

  id: int
  text: str
  special: bool = True
  lstrip: bool = False
  rstrip: bool = False

  def pattern(self) -> str:
    """Returns the regular expression of its places, whose one group is the token itself."""
    before, after = (r"\s*" if takes else "" for takes in (self.lstrip, self.rstrip))
    return f"{before}({re.escape(self.text)}){after}"


class SentencePieceTokenizer:
  """Text to ids and back.

  A text begins with a token of its own unless `tokenizer_config.json` has `add_bos_token` false.
  Which one, that file tells, or else `config.json`, or else the model. It never ends with one,
  whatever `add_eos_token` says: a prompt is to be continued. Tokens that `added_tokens.json` alone
  names count as special.

  Attributes:
    num_pieces: ids that the model itself has, without later ones.
  """

  def __init__(self, folder: Path):
    """Reads a folder.

    Raises:
      UserError: `tokenizer.model` is no SentencePiece model, a file beside it is damaged or does
        not fit it, or `sentencepiece` is not installed.
    """
    path = folder / SENTENCEPIECE_FILE
    data = path.read_bytes()
    settings = read_object(folder / _SETTINGS_FILE)
    self._first = self._later = load_sentencepiece(data, path)
    # Older releases begin every stretch of text between added tokens with a space.
    if not settings.get("legacy", False):
      self._later = load_sentencepiece(data + _NO_PREFIX, path)
    self.num_pieces = self._first.get_piece_size()
    self._added = _control_pieces(self._first) | _added_tokens(folder, settings)
    self._texts = {each.id: each.text for each in self._added.values() if not each.special}
    self._special = {each.id for each in self._added.values() if each.special}
    # The longest first: one may begin with another.
    longest = sorted(self._added, key=len, reverse=True)
    self._pattern = re.compile("|".join(self._added[text].pattern() for text in longest) or r"(?!)")
    self._bos_id = self._find_bos(folder, settings)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text that is to be continued."""
    ids = [] if self._bos_id is None else [self._bos_id]
    start = 0
    for match in self._pattern.finditer(text):
      ids += self._processor(start).encode(text[start : match.start()])
      ids.append(self._added[match[match.lastindex]].id)
      start = match.end()
    return ids + self._processor(start).encode(text[start:])

  def decode(self, ids: list[int]) -> str:
    """Returns the text of the ids; special ones, and those that are no token's, are skipped."""
    text, run = "", []
    for each in filter(self._is_shown, ids):
      if each not in self._texts:
        run.append(each)
        continue
      text += self._processor(len(text)).decode(run) + self._texts[each]
      run = []
    return text + self._processor(len(text)).decode(run)

  def _processor(self, start: int) -> Any:
    """Returns what reads and writes a stretch of text that starts there."""
    return self._later if start else self._first

  def _is_shown(self, token: int) -> bool:
    if token in self._texts or token in self._special:
      return token not in self._special
    return 0 <= token < self.num_pieces and not self._first.is_unknown(token)

  def _find_bos(self, folder: Path, settings: Mapping[str, Any]) -> int | None:
    given = settings.get("add_bos_token", True)
    if not isinstance(given, bool | None):
      raise _misfit(folder / _SETTINGS_FILE, "add_bos_token", given, "true or false")
    if not given:
      return None
    text = settings.get("bos_token")
    if text is not None:
      return self._id_of(text, folder / _SETTINGS_FILE)
    token = read_hub_config(folder).get("bos_token_id", self._first.bos_id())
    if type(token) is not int:
      raise _misfit(folder / CONFIG_FILE, "bos_token_id", token, "an id")
    return None if token == -1 else token

  def _id_of(self, given: Any, path: Path) -> int:
    text = given.get("content") if isinstance(given, dict) else given
    if not isinstance(text, str):
      raise _misfit(path, "bos_token", given, "the text of a token")
    if text in self._added:
      return self._added[text].id
    token = self._first.piece_to_id(text)
    if self._first.is_unknown(token):
      raise _misfit(path, "bos_token", given, f"a token that {SENTENCEPIECE_FILE} has")
    return token


def _misfit(path: Path, name: str, given: Any, expected: str) -> UserError:
  return UserError(f"{path} has {name} = {json.dumps(given)}; expected {expected}")


def _control_pieces(processor: Any) -> dict[str, _Added]:
  numbers = [i for i in range(processor.get_piece_size()) if processor.is_control(i)]
  return {text: _Added(i, text) for i in numbers if (text := processor.id_to_piece(i))}


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, _Added]:
  """Returns the tokens that were added to the model, by their texts."""
  path = folder / _ADDED_FILE
  plain = read_object(path)
  try:
    tokens = [_Added(_integer(token), text) for text, token in plain.items()]
    path = folder / _SETTINGS_FILE
    tokens += _described(settings.get("added_tokens_decoder") or {})
  except (AttributeError, KeyError, TypeError, ValueError):
    raise UserError(
      f"{path} is damaged: expected the texts and ids of added tokens, save or download it again"
    ) from None
  return {each.text: each for each in tokens}


def _described(table: Mapping[str, Any]) -> Iterator[_Added]:
  for token, entry in table.items():
    flags = {name: bool(entry.get(name)) for name in ("special", "lstrip", "rstrip")}
    yield _Added(int(token), _text(entry["content"]), **flags)


def _integer(value: Any) -> int:
  if type(value) is not int:
    raise TypeError(value)
  return value


def _text(value: Any) -> str:
  if not isinstance(value, str) or not value:
    raise TypeError(value)
  return value
