"""How one tensor of a checkpoint corresponds to slices of our parameters, in both directions.

Everything here is a bijection of arrays without arithmetic, so values pass unchanged and a gradient
transforms as its parameter does. The functions take NumPy and JAX arrays alike.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
  """A correspondence between one tensor of the hub and one or more of ours.

  Attributes:
    to_hub: our arrays, as positional arguments -> the hub's tensor.
    to_ours: the hub's tensor and the shapes of our arrays -> our arrays.
  """

  to_hub: Callable[..., Any]
  to_ours: Callable[[Any, Shapes], tuple[Any, ...]]

  def hub_shape(self, shapes: Shapes) -> Shape:
    """Returns the shape of the hub's tensor for our arrays' shapes."""
    return _hub_shape(self, shapes)


@functools.cache
def _hub_shape(transform: Transform, shapes: Shapes) -> Shape:
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.eval_shape(transform.to_hub, *arrays).shape


# The hub's tensor is ours.
SAME = Transform(lambda a: a, lambda t, shapes: (t,))
# The same numbers in the same order: a bias (H, K) that the hub keeps as one axis.
FLAT = Transform(lambda a: a.reshape(-1), lambda t, shapes: (t.reshape(shapes[0]),))
# torch.nn.Linear keeps (outputs, inputs); ours is (D, outputs ...), the outputs in one or two axes.
LINEAR = Transform(
  lambda a: a.reshape(a.shape[0], -1).T, lambda t, shapes: (t.T.reshape(shapes[0]),)
)
# The projection back to D, ours (inputs ..., D).
LINEAR_OUT = Transform(
  lambda a: a.reshape(-1, a.shape[-1]).T, lambda t, shapes: (t.T.reshape(shapes[0]),)
)

# Matrices of experts, ours (E, inputs, outputs), as the hub's (E, outputs, inputs).
TRANSPOSED = Transform(lambda a: a.swapaxes(-1, -2), lambda t, shapes: (t.swapaxes(-1, -2),))
# Experts (E, F, D) one below the other, (E F, D).
FLAT_EXPERTS = Transform(
  lambda a: a.reshape(-1, a.shape[-1]), lambda t, shapes: (t.reshape(shapes[0]),)
)


def joined(part: Transform, axis: int = 0) -> Transform:
  """Returns the transform of several arrays that the hub keeps in one tensor, one after another.

  Args:
    part: of each array by itself.
    axis: of the hub's tensor along which the parts follow each other.
  """

  def to_hub(*arrays):
    parts = [part.to_hub(a) for a in arrays]
    return parts[0].__array_namespace__().concatenate(parts, axis=axis)

  def to_ours(tensor, shapes):
    widths = [part.hub_shape((shape,))[axis] for shape in shapes]
    ends = list(itertools.accumulate(widths))[:-1]
    parts = tensor.__array_namespace__().split(tensor, ends, axis=axis)
    return tuple(
      part.to_ours(piece, (shape,))[0] for piece, shape in zip(parts, shapes, strict=True)
    )

  return Transform(to_hub, to_ours)


def then(first: Transform, second: Transform) -> Transform:
  """Returns `second` of what `first` makes of our arrays; `second` takes one array."""

  def to_hub(*arrays):
    return second.to_hub(first.to_hub(*arrays))

  def to_ours(tensor, shapes):
    (between,) = second.to_ours(tensor, (first.hub_shape(shapes),))
    return first.to_ours(between, shapes)

  return Transform(to_hub, to_ours)


# Two arrays (..., F) whose last axes alternate in the hub's (..., 2 F).
INTERLEAVED = Transform(
  lambda a, b: a.__array_namespace__().stack([a, b], axis=-1).reshape(*a.shape[:-1], -1),
  lambda t, shapes: (t[..., 0::2], t[..., 1::2]),
)
