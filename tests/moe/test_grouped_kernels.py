"""Each platform's kernels, interpreted here, equal XLA's ragged product and its derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from moe.compiled import FAST_COMPILE
from moe.ragged_oracle import RaggedDot

from moe_jax.moe.kernels import triton
from moe_jax.moe.kernels.megablox import Megablox
from moe_jax.moe.kernels.products import grouped_dot
from moe_jax.moe.kernels.triton import Triton

# No dimension is a multiple of the tiles of 16.
R, D, F, E = 50, 24, 40, 4
KERNELS = {
  "triton": Triton(rows_tile=16, out_tile=16, depth_tile=16, interpret=True),
  "megablox": Megablox(rows_tile=16, interpret=True),
}
SIZES = {
  "odd": (10, 1, 22, 17),
  "whole_tiles": (16, 0, 32, 0),
  "one_takes_all": (0, 50, 0, 0),
  "rows_beyond_the_sum": (0, 3, 16, 5),
  "nobody": (0, 0, 0, 0),
}
# Float32: sums of at most 50 products, in another order. bfloat16: one rounding of a float32 sum is
# 2^-9 of an entry; a sum kept in bfloat16 over 50 products would be ten times worse.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2.0**-8}


def make(dtype):
  """Returns rows, weights and a cotangent."""
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (R, D), (E, D, F), (R, F)
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def product_and_gradients(product):
  """Returns a compiled function that gives a grouped product and its two gradients."""

  def run(rows, weights, cotangent, sizes):
    out, vjp = jax.vjp(lambda rows, weights: product(rows, weights, sizes), rows, weights)
    return out, *vjp(cotangent)

  return jax.jit(run, compiler_options=FAST_COMPILE)


@functools.cache
def compiled(name):
  """Returns product and gradients, compiled once a dtype for all sizes."""
  # The oracle's derivative is XLA's, not that of `grouped_dot` over other kernels.
  ours = functools.partial(grouped_dot, KERNELS.get(name))
  return product_and_gradients(jax.lax.ragged_dot if name == "oracle" else ours)


def beyond(sizes):
  return (np.arange(R) >= sum(sizes))[:, None]


def assert_equals_oracle(name, sizes, dtype, run=None):
  rows, weights, cotangent = make(dtype)
  group_sizes = jnp.array(sizes, jnp.int32)
  exact = (a.astype(jnp.float32) for a in (rows, weights, cotangent))
  expected = compiled("oracle")(*exact, group_sizes)
  # What stands beyond the groups must reach nothing.
  spoilt = (jnp.where(beyond(sizes), jnp.nan, a) for a in (rows, cotangent))
  rows, cotangent = spoilt
  actual = (run or compiled(name))(rows, weights, cotangent, group_sizes)
  for a, b in zip(actual, expected, strict=True):
    assert a.dtype == dtype
    assert relative_error(a.astype(jnp.float32), b) <= TOLERANCE[dtype]
  return actual


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", KERNELS)
def test_product_and_gradients_equal_the_oracle(name, sizes):
  out, drows, dweights = assert_equals_oracle(name, sizes, jnp.float32)
  assert not np.any(np.asarray(out)[beyond(sizes)[:, 0]])
  assert not np.any(np.asarray(drows)[beyond(sizes)[:, 0]])
  assert not np.any(np.asarray(dweights)[np.array(sizes) == 0])


@pytest.mark.parametrize("sizes", ["odd", "rows_beyond_the_sum"])
def test_tiles_of_a_gpu_run_in_any_order(sizes, monkeypatch):
  # Interpreted they run one after the other, so that a tile could mend what another spoilt.
  in_order = triton._row_tiles
  monkeypatch.setattr(triton, "_row_tiles", lambda *a: tuple(t[::-1] for t in in_order(*a)))
  backwards = product_and_gradients(functools.partial(grouped_dot, KERNELS["triton"]))
  assert_equals_oracle("triton", SIZES[sizes], jnp.float32, backwards)


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_is_summed_in_float32(name):
  assert_equals_oracle(name, SIZES["rows_beyond_the_sum"], jnp.bfloat16)


@pytest.mark.parametrize("name", KERNELS)
def test_weight_gradients_in_bfloat16_are_summed_in_float32(name):
  # Asked for in float32, the sums show what a result in bfloat16 would round away.
  rows, _, others = make(jnp.bfloat16)
  sizes = jnp.array(SIZES["one_takes_all"], jnp.int32)
  outer = functools.partial(KERNELS[name].outer, dtype=jnp.float32)
  actual = jax.jit(outer, compiler_options=FAST_COMPILE)(rows, others, sizes)
  expected = RaggedDot().outer(rows, others, sizes, jnp.float32)
  assert relative_error(actual, expected) <= TOLERANCE[jnp.float32]
