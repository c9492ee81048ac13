"""Axes of a sweep, and how they combine: a point sets some fields of a config.

product(axis("moe.top_k", 1, 2), axis("seed", 0, 1, 2))     all six
zip_axes(axis("moe.top_k", 1, 2), axis("moe.num_experts", 8, 16))   two: (1, 8) and (2, 16)
chain(axis("moe.balance_loss_weight", 0.0, 0.01), axis("moe.bias_rate", 1e-3))   three
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.errors import UserError

Point = Mapping[str, Any]


def axis(field: str, *values: Any) -> list[Point]:
  """Returns a point for each value of one field, named by its dotted path in the config."""
  return [{field: value} for value in values]


def product(*axes: Sequence[Point]) -> list[Point]:
  """Returns every combination of a point from each axis; the last axis runs fastest.

  Raises:
    UserError: two axes set the same field.
  """
  return [_joined(points) for points in itertools.product(*axes)]


def zip_axes(*axes: Sequence[Point]) -> list[Point]:
  """Returns the first points of all axes as one, then the second ones, and so on.

  Raises:
    UserError: axes of different lengths, or two that set the same field.
  """
  lengths = [len(points) for points in axes]
  if len(set(lengths)) > 1:
    raise UserError(f"axes of {lengths} points cannot be zipped: they must be of one length")
  return [_joined(points) for points in zip(*axes, strict=True)]


def chain(*axes: Sequence[Point]) -> list[Point]:
  """Returns the points of one axis after those of another."""
  return list(itertools.chain(*axes))


def _joined(points: Sequence[Point]) -> Point:
  joined: dict[str, Any] = {}
  for point in points:
    if twice := joined.keys() & point.keys():
      raise UserError(f"two axes set {sorted(twice)[0]}; leave it to one of them")
    joined |= point
  return joined
