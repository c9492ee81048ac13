"""Command lines: a table of flags, `--name=value` or `--name value`, the last one wins.

Every word must belong to a flag: a stray or misspelt one is an error, never ignored.
"""

import dataclasses
import enum
from collections.abc import Collection, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from moe_jax.choices import did_you_mean, is_utf8, nearest
from moe_jax.errors import UserError

REQUIRED = object()
_OVERRIDE = "config."
_NEGATED_OVERRIDE = "noconfig."


class FlagKind(enum.Enum):
  """What a flag's text means."""

  CONFIG = "FILE[:VARIANT]"  # brings the --config.FIELD=VALUE overrides with it
  FOLDER = "DIR"
  FOLDERS = "DIR ..."  # repeatable; all values are kept, in order
  FILE = "FILE"
  TEXT = "TEXT"
  TEXTS = "TEXT ..."  # repeatable likewise
  PAIR = "A,B"  # also as two words after the flag
  INTEGER = "INT"
  SEED = "SEED"  # an integer that a random key takes: 0 to 2**32 - 1
  NUMBER = "NUMBER"
  SWITCH = "true|false"  # also without a value, which means true


@dataclasses.dataclass(frozen=True)
class Flag:
  """Describes one flag.

  Attributes:
    name: without dashes.
    kind: what its text means.
    help: one line.
    default: what it is if absent.
    instead: the name of a flag that takes its place: exactly one of the two is given.
  """

  name: str
  kind: FlagKind
  help: str
  default: Any = REQUIRED
  instead: str | None = None


def parse_command_line(
  argv: Sequence[str], *, flags: Sequence[Flag], program: str = "moe-jax"
) -> SimpleNamespace:
  """Parses the words after the subcommand.

  Args:
    argv: the words, without program and subcommand.
    flags: the flags that the subcommand takes.
    program: the command in error messages.

  Returns:
    A namespace with one attribute a flag. A flag of kind CONFIG gives `config` (the ConfigDict,
    overrides applied) and `config_source` (the text FILE[:VARIANT]).

  Raises:
    UserError: any word is misspelt, stray, missing or of the wrong type.
  """
  table = {flag.name: flag for flag in flags}
  given: dict[str, list[str]] = {}
  overrides: list[tuple[str, str | None]] = []
  for name, text in _pairs(argv, table, program):
    if name in table:
      given.setdefault(name, []).append(text)
    else:
      overrides.append((name, text))
  _check_alternatives(flags, given, program)
  values = {
    flag.name: None if flag.instead in given else _value(flag, given.get(flag.name), program)
    for flag in flags
  }
  for flag in flags:
    if flag.kind is FlagKind.CONFIG:
      values["config_source"] = values[flag.name]
      values[flag.name] = _load(values[flag.name], overrides)
  return SimpleNamespace(**values)


def _check_alternatives(flags: Sequence[Flag], given: Collection[str], program: str) -> None:
  """Refuses two flags of which one takes the other's place."""
  for flag in flags:
    if flag.instead in given and flag.name in given:
      raise UserError(
        f"{program} takes --{flag.name} or --{flag.instead}, and both were given; leave one out"
      )


def _pairs(
  argv: Sequence[str], table: dict[str, Flag], program: str
) -> Iterator[tuple[str, str | None]]:
  """Yields (flag name, text); the text is None for an override written without a value."""
  words = list(argv)
  for word in words:
    if not is_utf8(word):
      # Reports, JSON and terminals could not show it again.
      raise UserError(f"{word!r} is not UTF-8 text; expected arguments encoded in UTF-8")
  while words:
    word = words.pop(0)
    name, equals, text = word.removeprefix("--").partition("=")
    # A flag of several words is as often written with dashes.
    name = name if _is_known(name, table) else name.replace("-", "_")
    if not word.startswith("--") or not _is_known(name, table):
      raise _unexpected(word, table, program)
    if equals:
      yield name, text
    elif name in table:
      switch = table[name].kind is FlagKind.SWITCH
      yield name, "true" if switch else _next_words(words, table[name])
    else:
      takes_next = words and not words[0].startswith("--") and name.startswith(_OVERRIDE)
      yield name, words.pop(0) if takes_next else None


def _next_words(words: list[str], flag: Flag) -> str:
  """Takes the value of a flag written without "=" off the words; that of a pair is "A,B"."""
  count = 2 if flag.kind is FlagKind.PAIR and "," not in "".join(words[:1]) else 1
  flags = any(word.startswith("--") for word in words[1:count])
  if len(words) < count or flags:
    raise UserError(f"--{flag.name} needs a value: --{flag.name}={flag.kind.value}")
  return ",".join(words.pop(0) for _ in range(count))


def _is_known(name: str, table: dict[str, Flag]) -> bool:
  has_config = any(flag.kind is FlagKind.CONFIG for flag in table.values())
  return name in table or (has_config and name.startswith((_OVERRIDE, _NEGATED_OVERRIDE)))


def _unexpected(word: str, table: dict[str, Flag], program: str) -> UserError:
  """Explains a word that is no flag: dashes forgotten, misspelt, or stray."""
  name, equals, text = word.lstrip("-").partition("=")
  if _is_known(name, table) and equals:
    return UserError(f"unexpected argument {word!r}; did you mean --{name}={text}?")
  if not word.startswith("-") and not (equals and nearest(name, table)):
    return UserError(
      f"unexpected argument {word!r}; {program} takes only flags, written --name=value"
      " (quote a value that holds spaces)"
    )
  return UserError(f"{word.partition('=')[0]} is no flag of {program}; {_flag_hint(name, table)}")


def _flag_hint(name: str, table: dict[str, Flag]) -> str:
  """Suggests a flag; for `confg.a.b` corrects the first word and keeps the rest."""
  first, dot, rest = name.partition(".")
  if dot and nearest(first, table) is not None and _is_known(f"{_OVERRIDE}{rest}", table):
    return f"did you mean --{_OVERRIDE}{rest}?"
  return did_you_mean(name, table, "--")


def _value(flag: Flag, texts: list[str] | None, program: str) -> Any:
  """Converts what was given for one flag, or returns its default."""
  if texts is None:
    if flag.default is REQUIRED:
      raise UserError(f"{program} needs --{flag.name}={flag.kind.value} ({flag.help})")
    return flag.default
  if flag.kind in (FlagKind.FOLDERS, FlagKind.TEXTS):
    return tuple(_convert(flag, text) for text in texts)
  return _convert(flag, texts[-1])


def _convert(flag: Flag, text: str) -> Any:
  """Converts one text to the type its kind means."""
  if flag.kind is FlagKind.TEXT:
    return text
  if not text:
    raise UserError(f"--{flag.name}= is empty, expected --{flag.name}={flag.kind.value}")
  if flag.kind is FlagKind.PAIR:
    return _pair(flag, text)
  kinds = {
    FlagKind.INTEGER: (int, "an int"),
    FlagKind.SEED: (_seed, "an int from 0 to 4294967295"),
    FlagKind.NUMBER: (float, "a number"),
    FlagKind.SWITCH: (_switch, "true or false"),
  }
  convert, expected = kinds.get(flag.kind, (str, "text"))
  try:
    return convert(text)
  except ValueError as error:
    raise UserError(f"--{flag.name}={text}: {text!r} is not {expected}") from error


def _seed(text: str) -> int:
  seed = int(text)
  if not 0 <= seed < 2**32:
    raise ValueError(f"{seed} is no seed")
  return seed


def _switch(text: str) -> bool:
  if text.lower() not in ("true", "false"):
    raise ValueError(f"{text} is neither true nor false")
  return text.lower() == "true"


def _pair(flag: Flag, text: str) -> tuple[str, str]:
  parts = tuple(part.strip() for part in text.split(","))
  if len(parts) != 2 or not all(parts):
    raise UserError(
      f"--{flag.name}={text} does not name two things, expected --{flag.name}={flag.kind.value}"
    )
  return parts


def _load(source: str | None, overrides: list[tuple[str, str | None]]) -> Any:
  """Loads the config file and applies the overrides in order."""
  if source is None:
    if overrides:
      raise UserError(f"--{overrides[0][0]} changes a config, and --config=FILE was not given")
    return None
  # Imported late: ml_collections takes longer to import than `moe-jax --help` takes to print.
  from moe_jax.config.load import load_config, override

  config = load_config(source)
  for name, text in overrides:
    field = name.removeprefix(_OVERRIDE)
    if name.startswith(_NEGATED_OVERRIDE):
      field = name.removeprefix(_NEGATED_OVERRIDE)
      if text is not None:
        raise UserError(f"--{name}={text}: --no... takes no value; use --config.{field}={text}")
      text = "false"
    elif text is None:
      text = _bare_value(config, field)
    override(config, field, text)
  return config


def _bare_value(config: Any, field: str) -> str:
  """Returns "true" for a bare boolean override; any other type needs a value."""
  try:
    current = config
    for part in field.split("."):
      current = current[part]
  except (KeyError, TypeError):
    return "true"  # an unknown field: `override` names the nearest one
  if isinstance(current, bool):
    return "true"
  raise UserError(f"--config.{field} needs a value: --config.{field}={current}")
