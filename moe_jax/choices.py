"""Named choices that users write as text, and the nearest valid one for error messages."""

import difflib
import enum
from collections.abc import Iterable
from typing import TypeVar

from moe_jax.errors import UserError

Choice = TypeVar("Choice", bound=enum.StrEnum)

_LISTED = 12


def nearest(name: str, choices: Iterable[str]) -> str | None:
  """Returns the choice closest in spelling to `name`, or None when none is close."""
  choices = list(choices)
  by_lower_case = {choice.lower(): choice for choice in reversed(choices)}
  found = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
  return by_lower_case[found[0]] if found else None


def did_you_mean(name: str, choices: Iterable[str], prefix: str = "") -> str:
  """Builds the end of an error sentence: the nearest choice, or else the list of choices.

  Args:
    name: what the user wrote, without `prefix`.
    choices: the valid names, without `prefix`.
    prefix: put before every name shown, for example "config.moe.".

  Returns:
    "did you mean config.moe.top_k?", or "expected one of a, b, c" when nothing is close.
  """
  choices = list(choices)
  close = nearest(name, choices)
  if close is not None:
    return f"did you mean {prefix}{close}?"
  return f"expected {_one_of([prefix + choice for choice in choices])}"


def _one_of(choices: list[str]) -> str:
  """Lists a bounded number of choices as prose."""
  if not choices:
    return "nothing here"
  if len(choices) == 1:
    return choices[0]
  rest = len(choices) - _LISTED
  shown = ", ".join(choices[:_LISTED])
  return f"one of {shown}" + (f" and {rest} more" if rest > 0 else "")


def is_utf8(text: str) -> bool:
  """Tells whether UTF-8 can encode `text`: words that are not UTF-8 reach Python as surrogates."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def as_choice(kind: type[Choice], name: str, value: str) -> Choice:
  """Returns the member of `kind` that has this value.

  Raises:
    UserError: no member has it; the message names the field, all members and the nearest one.
  """
  try:
    return kind(value)
  except ValueError:
    near = nearest(str(value), list(kind))
    hint = f"; did you mean {str(near)!r}?" if near else ""
    raise UserError(f"{name} = {value!r} is not one of {', '.join(kind)}{hint}") from None
