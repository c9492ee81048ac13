"""The layout of the program being traced, for layers that do not otherwise know where they run."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from moe_jax.sharding.layout import Axes, Layout

_LAYOUT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: Layout | None) -> Iterator[None]:
  """Makes a layout the current one; enter it inside the function that is compiled."""
  token = _LAYOUT.set(layout)
  try:
    yield
  finally:
    _LAYOUT.reset(token)


def current_layout() -> Layout | None:
  """Returns the layout of the program being traced; None on one device."""
  return _LAYOUT.get()


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
  """Tells the compiler where x lives, by the names of its axes; x itself without a layout."""
  layout = current_layout()
  if layout is None:
    return x
  return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape, "an activation"))
