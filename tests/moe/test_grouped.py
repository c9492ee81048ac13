"""The grouped product equals a loop over experts, in values and in gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error

from moe_jax.moe.grouped import block_rows, grouped_apply

E, N, D, F = 4, 21, 5, 6
BLOCK = 4
# Float32 sums of at most 21 products, in another order.
TOLERANCE = 1e-5
SIZES = {
  "even": (5, 5, 5, 6),
  "full": (4, 8, 4, 5),
  "holes": (0, 7, 0, 14),
  "one_takes_all": (0, 0, 21, 0),
  "first_takes_all": (21, 0, 0, 0),
  "single_rows": (1, 1, 1, 1),
  "rows_beyond_the_sum": (3, 0, 9, 2),
  "nobody": (0, 0, 0, 0),
}


def network(x, w, key):
  """A plain expert with a bias, whose gradient sees rows of zeros too; `key` is unused."""
  return jax.nn.silu(x @ w["up"] + w["bias"][None]) @ w["down"]


def make():
  """Returns rows, weights and a cotangent."""
  keys = jax.random.split(jax.random.key(0), 5)
  weights = {
    "up": jax.random.normal(keys[0], (E, D, F)),
    "down": jax.random.normal(keys[1], (E, F, D)),
    "bias": jax.random.normal(keys[4], (E, F)),
  }
  rows = jax.random.normal(keys[2], (N, D))
  return rows, weights, jax.random.normal(keys[3], (N, D))


def loop(rows, sizes, weights):
  """The judge: every expert on every row, of which each row takes its owner's."""
  ends = jnp.cumsum(sizes)
  out = jnp.zeros_like(rows)
  for expert in range(E):
    w = {name: value[expert] for name, value in weights.items()}
    row = jnp.arange(len(rows))
    mine = (row >= ends[expert] - sizes[expert]) & (row < ends[expert])
    out = jnp.where(mine[:, None], network(rows, w, None), out)
  return out


@functools.cache
def compiled(jit):
  """Returns values and gradients of the grouped product, compiled once for all sizes."""

  def both(rows, sizes, weights, cotangent):
    def apply(rows, weights):
      return grouped_apply(network, BLOCK, rows, sizes, weights, None)

    out, vjp = jax.vjp(apply, rows, weights)
    return out, *vjp(cotangent)

  return jax.jit(both) if jit else both


@jax.jit
def loop_both(rows, sizes, weights, cotangent):
  out, vjp = jax.vjp(lambda rows, weights: loop(rows, sizes, weights), rows, weights)
  return out, *vjp(cotangent)


def assert_equals_loop(sizes, jit):
  rows, weights, cotangent = make()
  sizes = jnp.array(sizes, jnp.int32)
  actual = compiled(jit)(rows, sizes, weights, cotangent)
  expected = loop_both(rows, sizes, weights, cotangent)
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert relative_error(a, b) <= TOLERANCE
  return actual


@pytest.mark.parametrize("name", SIZES)
def test_grouped_equals_a_loop(name):
  assert_equals_loop(SIZES[name], jit=True)


def test_grouped_equals_a_loop_without_jit():
  assert_equals_loop(SIZES["rows_beyond_the_sum"], jit=False)


def test_an_expert_without_rows_gets_exactly_no_gradient():
  _, _, dweights = assert_equals_loop(SIZES["holes"], jit=True)
  for value in dweights.values():
    assert not np.any(value[0]) and not np.any(value[2])
    assert np.any(value[1]) and np.any(value[3])


def test_what_stands_beyond_the_groups_reaches_nothing():
  rows, weights, cotangent = make()
  sizes = jnp.array(SIZES["rows_beyond_the_sum"], jnp.int32)
  clean = compiled(True)(rows, sizes, weights, cotangent)
  spoilt = compiled(True)(rows.at[14:].set(jnp.nan), sizes, weights, cotangent)
  jax.tree.map(np.testing.assert_array_equal, spoilt, clean)


def test_one_experts_overflow_stays_its_own():
  rows, weights, cotangent = make()
  sizes = SIZES["even"]
  spoilt = rows.at[5:10].set(jnp.inf)
  _, drows, dweights = compiled(True)(spoilt, jnp.array(sizes, jnp.int32), weights, cotangent)
  assert np.all(np.isfinite(np.delete(drows, np.s_[5:10], axis=0)))
  for value in dweights.values():
    assert np.all(np.isfinite(np.delete(value, 1, axis=0)))


def test_bfloat16_weight_gradients_accumulate_in_float32():
  # 4,096 equal rows: a bfloat16 running sum would stop growing near 256 of them.
  count = 4096
  rows, weights = jnp.ones((count, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16)
  sizes = jnp.array([count], jnp.int32)

  def apply(weights):
    return grouped_apply(lambda x, w, key: x @ w, 1, rows, sizes, weights, None)

  out, vjp = jax.vjp(apply, weights)
  (gradient,) = vjp(jnp.ones_like(out))
  assert gradient.dtype == jnp.bfloat16
  assert float(gradient[0, 0, 0]) == count


def test_each_block_draws_its_own_numbers():
  keys = jax.random.split(jax.random.key(0), E)

  def noise(x, w, key):
    return jax.random.uniform(key, x.shape)

  weights = jnp.zeros((E, 1))
  sizes = jnp.array(SIZES["even"], jnp.int32)
  out = grouped_apply(noise, BLOCK, jnp.zeros((N, D)), sizes, weights, keys)
  assert len(np.unique(np.asarray(out))) == N * D


@pytest.mark.parametrize(
  ("num_rows", "num_experts", "expected"),
  [(1, 64, 32), (1024, 8, 32), (4096, 8, 128), (6000, 8, 128), (10**6, 8, 256)],
)
def test_blocks_follow_the_mean_load(num_rows, num_experts, expected):
  assert block_rows(num_rows, num_experts) == expected
