"""Spread and collect against index lookups and a scatter left to automatic differentiation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error

from moe_jax.moe.moves import Moves, collect, spread

T, K, R, D = 5, 2, 12, 3
# Sums of two float32 products, in another order.
TOLERANCE = 1e-6
# Assignments 3 and 8 have no row; rows 1, 4, 6 and 11 are empty.
ROW = np.array([7, 0, 2, R, 5, 10, 3, 9, R, 8], np.int32)
ASSIGNMENT = np.array([1, 10, 2, 6, 10, 4, 10, 0, 9, 7, 5, 10], np.int32)


def moves(top_k):
  return Moves(jnp.repeat(jnp.arange(T), K), jnp.array(ROW), jnp.array(ASSIGNMENT), T, top_k)


def value_and_gradients(fn, *args):
  out, vjp = jax.vjp(fn, *args)
  return out, *vjp(jax.random.normal(jax.random.key(9), out.shape, out.dtype))


def assert_close(actual, expected):
  for a, b in zip(actual, expected, strict=True):
    assert relative_error(a, b) <= TOLERANCE


def spread_by_scatter(x):
  return jnp.zeros((R, D)).at[ROW].set(jnp.repeat(x, K, axis=0), mode="drop")


def collect_by_scatter(rows, weight):
  taken = jnp.concatenate([rows, jnp.zeros((1, D))])[ROW]
  return jnp.zeros((T, D)).at[np.repeat(np.arange(T), K)].add(taken * weight[:, None])


@pytest.mark.parametrize("top_k", [K, None])
def test_spread_and_its_gradient_equal_a_scatter(top_k):
  x = jax.random.normal(jax.random.key(0), (T, D))
  actual = value_and_gradients(lambda x: spread(x, moves(top_k)), x)
  assert_close(actual, value_and_gradients(spread_by_scatter, x))


@pytest.mark.parametrize("top_k", [K, None])
def test_collect_and_its_gradients_equal_a_scatter(top_k):
  rows = jax.random.normal(jax.random.key(1), (R, D))
  weight = jax.random.normal(jax.random.key(2), (T * K,))
  actual = value_and_gradients(lambda r, w: collect(r, w, moves(top_k)), rows, weight)
  assert_close(actual, value_and_gradients(collect_by_scatter, rows, weight))


def test_any_order_of_assignments_collects_the_same():
  order = np.array([4, 9, 0, 7, 2, 5, 8, 1, 6, 3])
  rows = jax.random.normal(jax.random.key(1), (R, D))
  weight = jax.random.normal(jax.random.key(2), (T * K,))
  sorted_moves = moves(K)
  shuffled = dataclasses.replace(
    sorted_moves,
    token=sorted_moves.token[order],
    row=sorted_moves.row[order],
    assignment=jnp.array(np.append(np.argsort(order), T * K)[ASSIGNMENT], jnp.int32),
    top_k=None,
  )
  expected = value_and_gradients(lambda r, w: collect(r, w, sorted_moves), rows, weight)
  out, drows, dweight = value_and_gradients(
    lambda r, w: collect(r, w, shuffled), rows, weight[order]
  )
  assert_close((out, drows, dweight[np.argsort(order)]), expected)


def test_bfloat16_choices_are_summed_in_float32():
  # 1 + 2^-8 is no bfloat16: a bfloat16 sum would lose each of the small terms.
  rows = jnp.array([[1.0]] + [[2.0**-8]] * 8, jnp.bfloat16)
  each = jnp.arange(9, dtype=jnp.int32)
  y = collect(rows, jnp.ones(9), Moves(jnp.zeros(9, jnp.int32), each, each, 1, 9))
  assert y.dtype == jnp.bfloat16
  assert float(y[0, 0]) == 1 + 2.0**-5
