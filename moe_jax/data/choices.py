"""The error for a name that is not in a table."""

import difflib
from collections.abc import Iterable

from moe_jax.errors import UserError


def unknown_name(field: str, name: object, choices: Iterable[str]) -> UserError:
  """Returns the error for a name outside `choices`, with the nearest one or, failing that, all."""
  choices = sorted(choices)
  near = difflib.get_close_matches(str(name), choices, n=1)
  hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}."
  return UserError(f"unknown {field} {name!r}; {hint}")
