"""Bounds of the numbers in a config."""

from typing import Any

from moe_jax.errors import UserError


def at_least(config: Any, least: float, *names: str) -> None:
  """Refuses fields that are below a bound.

  Raises:
    UserError: one is; a NaN is too.
  """
  for name in names:
    # "not >=" rather than "<": a NaN must not pass.
    if not getattr(config, name) >= least:
      raise UserError(f"{name} = {getattr(config, name)} is refused: it must be at least {least}")


def below(config: Any, bound: float, *names: str) -> None:
  """Refuses fields that are not below a bound.

  Raises:
    UserError: one is not; a NaN neither.
  """
  for name in names:
    if not getattr(config, name) < bound:
      raise UserError(f"{name} = {getattr(config, name)} is refused: it must be below {bound}")
