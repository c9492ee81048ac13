"""A pipeline: layers split over stages, microbatches passing through them one behind another.

The schedule is GPipe's (arXiv 1811.06965): all microbatches forward, then all backward. It is
written as in GSPMD (arXiv 2105.04663 section 3.3): one scan over ticks, in which every stage works
on the microbatch that the stage before it handed on a tick ago. With S stages and M microbatches
there are M + S - 1 ticks, so each device is idle, or rather works for nothing, in the share
(S - 1) / (M + S - 1) of them. No result of such a bubble is ever read.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.errors import UserError
from moe_jax.sharding.layout import Layout

# run(layers, x, of_layers, shared) -> x, records: some consecutive layers, for one microbatch.
# `layers`, `of_layers` and `records` have a leading axis of these layers; `shared` has not.
RunLayers = Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, Any]]


def num_stages(layout: Layout | None) -> int:
  """Returns the number of pipeline stages; 1 on one device."""
  return 1 if layout is None else layout.parts("layers")


def check_stages(what: str, repeats: int, stages: int) -> None:
  """Refuses layers that stages cannot share equally.

  Raises:
    UserError: names both numbers and the nearest that fit.
  """
  if repeats % stages == 0:
    return
  below, above = repeats // stages * stages, -(-repeats // stages) * stages
  near = f"{below} or {above}" if below else f"{above}"
  fits = max(n for n in range(1, stages + 1) if repeats % n == 0)
  raise UserError(
    f"{what} has repeats = {repeats}, which stage = {stages} does not divide: make it {near}, or"
    f" use stage = {fits}"
  )


def through_stages(
  run: RunLayers, layout: Layout, layers: Any, x: jax.Array, of_layers: Any, shared: Any
) -> tuple[jax.Array, Any]:
  """Returns run(layers, x, of_layers, shared), with every stage's layers on its own devices.

  Under `jax.vmap` over microbatches these fill the pipeline together, layers being the same for
  all; a single call is one microbatch alone, which has one stage at work at a time. Reverse-mode
  gradients are those of the call under `jax.vmap`.

  Args:
    run: applies some of the layers.
    layout: the mesh; its axes of "layers" are the stages, R of the layers divided by them.
    layers: arrays (R, ...).
    x: what passes through all layers, (...).
    of_layers: arrays (R, ...) that belong to layers and to the microbatch.
    shared: arrays of the microbatch that all layers read.
  """

  @custom_vmap
  def alone(layers, x, of_layers, shared):
    own = jax.tree.map(lambda a: a[None], (x, of_layers, shared))
    return jax.tree.map(lambda a: a[0], run_pipeline(run, layout, layers, *own))

  @alone.def_vmap
  def together(axis_size, in_batched, layers, *own):
    def batched(a, is_batched):
      return a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))

    own = jax.tree.map(batched, own, tuple(in_batched[1:]))
    out = run_pipeline(run, layout, layers, *own)
    return out, jax.tree.map(lambda _: True, out)

  return alone(layers, x, of_layers, shared)


def run_pipeline(
  run: RunLayers, layout: Layout, layers: Any, x: jax.Array, of_layers: Any, shared: Any
) -> tuple[jax.Array, Any]:
  """Returns x and records of M microbatches that pass through all stages.

  Args:
    run, layout: see `through_stages`.
    layers: arrays (R, ...), the same for all microbatches.
    x: (M, ...).
    of_layers: arrays (M, R, ...).
    shared: arrays (M, ...).

  Returns:
    x (M, ...) after the last layer, and records (M, R, ...).
  """
  (axis,), S, M = layout.mesh_axes("layers"), num_stages(layout), x.shape[0]
  layers = _split(layers, S, axis=0)
  of_layers = _split(of_layers, S, axis=1)
  stages = jnp.arange(S)
  run_stages = jax.vmap(run, spmd_axis_name=axis)

  # Stages other than the first get copies that nobody reads: whatever crosses stages besides what
  # they hand on then does so once, before and after all ticks.
  arrivals = _at_stages(jnp.broadcast_to(x[:, None], (M, S, *x.shape[1:])), axis, layout)
  is_first = (stages == 0).reshape(S, *[1] * (x.ndim - 1))

  def tick(handed_on, now):
    # Before the first microbatch and after the last, a stage repeats one that exists: a bubble
    # with finite numbers, so that its gradient, which nobody asks for, is 0 and not NaN.
    here = jnp.clip(now - stages, 0, M - 1)
    new = jax.lax.dynamic_index_in_dim(arrivals, jnp.minimum(now, M - 1), keepdims=False)
    arrived = jnp.where(is_first, new, jnp.roll(handed_on, 1, axis=0))
    own = jax.tree.map(lambda a: a[here, stages], of_layers)
    done, records = run_stages(layers, arrived, own, jax.tree.map(lambda a: a[here], shared))
    return done, (done, records)

  _, (done, records) = jax.lax.scan(tick, arrivals[0], jnp.arange(M + S - 1))
  done = _at_stages(done, axis, layout)
  when = jnp.arange(M)[:, None] + stages[None]

  def in_order(a):
    """Takes each microbatch's record of each stage from the tick at which it was made."""
    taken = a[when, stages]
    return taken.reshape(M, S * taken.shape[2], *taken.shape[3:])

  return done[S - 1 :, S - 1], jax.tree.map(in_order, records)


def _at_stages(x: jax.Array, axis: str, layout: Layout) -> jax.Array:
  """Keeps the second axis of x, that of stages, where the stages are."""
  free = PartitionSpec.UNCONSTRAINED
  spec = PartitionSpec(free, axis, *[free] * (x.ndim - 2))
  return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def _split(tree: Any, count: int, *, axis: int) -> Any:
  """Cuts an axis of every array into (count, size / count)."""

  def cut(a):
    return a.reshape(*a.shape[:axis], count, a.shape[axis] // count, *a.shape[axis + 1 :])

  return jax.tree.map(cut, tree)
