"""Named choices that users write as text."""

import difflib
import enum
from typing import TypeVar

from moe_jax.errors import UserError

Choice = TypeVar("Choice", bound=enum.StrEnum)


def as_choice(kind: type[Choice], name: str, value: str) -> Choice:
  """Returns the member of `kind` that has this value.

  Raises:
    UserError: no member has it; the message names the field, all members and the nearest one.
  """
  try:
    return kind(value)
  except ValueError:
    near = difflib.get_close_matches(str(value), list(kind), n=1)
    hint = f"; did you mean {str(near[0])!r}?" if near else ""
    raise UserError(f"{name} = {value!r} is not one of {', '.join(kind)}{hint}") from None
