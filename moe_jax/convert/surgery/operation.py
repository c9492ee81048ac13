"""An operation on a model: what becomes of each layer's feed-forward, for all that is kept of it.

The optimiser keeps moments for every parameter. What copies, splits or averages a parameter does
the same to them, so one edit is applied to parameters and moments alike, told apart by `Role`.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping

import numpy as np

from moe_jax.convert.rules import Path, parameter_shapes
from moe_jax.convert.surgery.layer_trees import Leaves, layer_kinds, put_together, take_apart
from moe_jax.errors import UserError
from moe_jax.models import ModelConfig


class Role(enum.Enum):
  """What an array is to its parameter."""

  VALUE = "value"
  FIRST_MOMENT = "first_moment"  # Adam's mean of gradients
  SECOND_MOMENT = "second_moment"  # and of their squares

  def scaled(self, array: np.ndarray, factor: float) -> np.ndarray:
    """Returns what the array becomes when the parameter is multiplied by a factor s.

    The gradient of a function of s p with respect to s p is 1 / s of that with respect to p.
    """
    power = {Role.VALUE: 1, Role.FIRST_MOMENT: -1, Role.SECOND_MOMENT: -2}[self]
    return array if factor == 1 else array * np.asarray(factor**power, array.dtype)


# From the arrays of a feed-forward, by their places in it, to those of its successor. The variables
# that no gradient reaches are there for `Role.VALUE` alone.
FeedForwardEdit = Callable[[Leaves, Role], Leaves]


@dataclasses.dataclass(frozen=True)
class Operation:
  """What makes a model of one config a model of another.

  Attributes:
    source, target: the configs.
    edits: by the number of the layer; the blocks of multi-token prediction follow the last one.
      Other layers keep their arrays.
  """

  source: ModelConfig
  target: ModelConfig
  edits: Mapping[int, FeedForwardEdit]

  def apply(self, leaves: Leaves, role: Role = Role.VALUE) -> Leaves:
    """Returns the arrays of the target from those of the source.

    Args:
      leaves: of the model's variables, or of the moments of its parameters.
      role: which of them.

    Raises:
      UserError: the target's config asks for other arrays than the operation makes.
    """
    self._check_blocks()
    trees = take_apart(leaves, self.source)
    for layer, edit in self.edits.items():
      trees.layers[layer] = _edit_layer(trees.layers[layer], edit, role)
    made = put_together(trees, self.target)
    if role is Role.VALUE:
      _check_shapes(made, self.target)
    return made

  def _check_blocks(self) -> None:
    """Refuses a target with other blocks, which would lose layers or ask for some that are not."""
    old, new = layer_kinds(self.source), layer_kinds(self.target)
    edited = [kind[:1] + kind[2:] if i in self.edits else kind for i, kind in enumerate(old)]
    found = [kind[:1] + kind[2:] if i in self.edits else kind for i, kind in enumerate(new)]
    if found != edited:
      raise UserError(
        f"segments = {self.target.segments} with mtp_depth = {self.target.mtp_depth} is refused:"
        f" the source has segments = {self.source.segments} with mtp_depth ="
        f" {self.source.mtp_depth}, and the operation changes feed-forwards alone"
      )


def _edit_layer(layer: Leaves, edit: FeedForwardEdit, role: Role) -> Leaves:
  prefix = feed_forward_place(layer)
  inner = {path[len(prefix) :]: a for path, a in layer.items() if path[: len(prefix)] == prefix}
  outer = {path: a for path, a in layer.items() if path[: len(prefix)] != prefix}
  return outer | {prefix + path: a for path, a in edit(inner, role).items()}


def feed_forward_place(layer: Leaves) -> Path:
  """Returns the place of a layer's feed-forward in its block."""
  # A depth block holds the block that some tokens take.
  inner = any(path[0] == "block" for path in layer)
  return ("block", "feed_forward") if inner else ("feed_forward",)


def layers_of(config: ModelConfig, word: str) -> list[int]:
  """Returns the numbers of the layers with this feed-forward, "dense" or "moe"."""
  return [layer for layer, kind in enumerate(layer_kinds(config)) if kind[1] == word]


def block_words(config: ModelConfig) -> list[str]:
  """Returns the block of every layer of the segments as patterns spell it."""
  return [":".join(kind) for kind in config.layers()]


def _check_shapes(made: Leaves, target: ModelConfig) -> None:
  wanted = parameter_shapes(target)
  for path in [*wanted, *made]:
    have = made[path].shape if path in made else "absent"
    need = wanted.get(path, "absent")
    if have != need:
      raise UserError(
        f"{'.'.join(map(str, path))} would be {have} and the target's config asks for {need}:"
        " change only what the operation is to change, and what has no parameters"
      )
