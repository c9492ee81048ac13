"""Masks and counts that the metrics share.

A mask of None means "all". Masks are arguments: no id and no value marks padding, so an id where a
mask is False is never read.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError


def full_mask(mask: jax.Array | None, shape: tuple[int, ...], name: str) -> jax.Array:
  """Returns a mask of that shape, all True for None.

  Raises:
    UserError: the mask has another shape or is not bool.
  """
  if mask is None:
    return jnp.ones(shape, bool)
  mask = jnp.asarray(mask)
  if mask.shape != shape or mask.dtype != bool:
    raise UserError(
      f"{name} has shape {mask.shape} and dtype {mask.dtype}; expected {shape} and bool"
    )
  return mask


@jax.jit
def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the float32 mean of `values` where `mask` is True; 0 where nothing is."""
  # A NaN times 0 is a NaN, so what is masked out is replaced, not multiplied away.
  total = jnp.sum(jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0))
  return total / jnp.maximum(jnp.sum(mask), 1)


@jax.jit
def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """Returns numerator / denominator in float32, 0 where the denominator is 0."""
  numerator = jnp.asarray(numerator, jnp.float32)
  denominator = jnp.asarray(denominator, jnp.float32)
  return jnp.where(denominator == 0, 0.0, numerator / jnp.where(denominator == 0, 1.0, denominator))


def count_ids(ids: jax.Array, size: int, mask: jax.Array, name: str) -> jax.Array:
  """Counts how often each id below `size` stands where `mask` is True: (size,) int32.

  Raises:
    UserError: an id is out of range. Inside a compiled function, where ids are not known, it is
      left out of the counts.
  """
  refuse_out_of_range(ids, size, mask, name)
  return _count((jnp.asarray(ids),), (size,), mask)


def count_pairs(
  rows: jax.Array,
  columns: jax.Array,
  shape: tuple[int, int],
  mask: jax.Array,
  names: tuple[str, str],
) -> jax.Array:
  """Counts the pairs (row, column) where `mask` is True: an int32 table of that shape.

  Raises:
    UserError: as `count_ids`, for either side.
  """
  for ids, size, name in zip((rows, columns), shape, names, strict=True):
    refuse_out_of_range(ids, size, mask, name)
  return _count((jnp.asarray(rows), jnp.asarray(columns)), shape, mask)


@functools.partial(jax.jit, static_argnames="num_experts")
def expert_sets(expert: jax.Array, num_experts: int, asked: jax.Array) -> jax.Array:
  """Turns choices (..., K) into sets (..., E) bool: which experts the token asked for."""
  chosen = jax.nn.one_hot(expert, num_experts, dtype=bool) & asked[..., None]
  return jnp.any(chosen, axis=-2)


@functools.partial(jax.jit, static_argnames="shape")
def _count(ids: tuple[jax.Array, ...], shape: tuple[int, ...], mask: jax.Array) -> jax.Array:
  # A negative index would count from the end; `size` lies outside, where a scatter drops.
  index = tuple(
    jnp.where(mask & (each >= 0), each.astype(jnp.int32), size)
    for each, size in zip(ids, shape, strict=True)
  )
  return jnp.zeros(shape, jnp.int32).at[index].add(1, mode="drop")


def refuse_out_of_range(ids: jax.Array, size: int, mask: jax.Array, name: str) -> None:
  """Refuses an id outside [0, size) where `mask` is True; says nothing of ids not yet known.

  Raises:
    UserError: an id is out of range, outside a compiled function.
  """
  if isinstance(ids, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
    return
  counted = np.asarray(ids)[np.asarray(mask)]
  wrong = counted[(counted < 0) | (counted >= size)]
  if wrong.size:
    raise UserError(f"{name} holds {wrong[0]}; expected integers from 0 to {size - 1}")
