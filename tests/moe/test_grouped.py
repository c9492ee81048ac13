"""The grouped experts equal a loop over experts, in values and in gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from moe.compiled import FAST_COMPILE
from moe.ragged_oracle import RaggedDot

from moe_jax.errors import UserError
from moe_jax.layers.mlp import Activation, FeedForwardConfig, feed_forward
from moe_jax.moe import MoEConfig, RoutingConfig, grouped
from moe_jax.moe.grouped import GroupedKernel, grouped_experts
from moe_jax.moe.kernels.blocked import block_lengths, blocked_experts
from moe_jax.moe.moves import Moves
from moe_jax.moe.options import WeightOn

T, K, E, D, F = 7, 3, 4, 5, 6
N = T * K
BLOCKS = (4, 2)
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
NETWORK = FeedForwardConfig(F, gated=True, activation=Activation.SILU, bias=True)


def network(x, w, key, product, last_product):
  return feed_forward(x, w, key, NETWORK, product=product, last_product=last_product)


def make_moves(sizes, top_k=K):
  """Puts a random part of the assignments into the rows of the experts."""
  used = sum(sizes)
  chosen = np.random.default_rng(0).permutation(N)[:used].astype(np.int32)
  row = np.full(N, N, np.int32)
  row[chosen] = np.arange(used)
  token = np.arange(N, dtype=np.int32) // top_k
  assignment = np.concatenate([chosen, np.full(N - used, N, np.int32)])
  return Moves(jnp.array(token), jnp.array(row), jnp.array(assignment), N // top_k, top_k)


def make(num_tokens=T):
  """Returns tokens, combine weights, expert weights and a cotangent."""
  keys = jax.random.split(jax.random.key(0), 9)
  shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
  biases = {"gate_bias": (E, F), "up_bias": (E, F), "down_bias": (E, D)}
  weights = {
    name: jax.random.normal(key, shape)
    for key, (name, shape) in zip(keys[3:], (shapes | biases).items(), strict=True)
  }
  x = jax.random.normal(keys[0], (num_tokens, D))
  return x, jax.random.uniform(keys[1], (N,)), weights, jax.random.normal(keys[2], x.shape)


def loop(x, weight, weights, moves, sizes):
  """The judge: every expert on every row, of which each row takes its owner's."""
  ends = jnp.cumsum(sizes)
  row = jnp.arange(N)
  assignment = jnp.minimum(moves.assignment, N - 1)
  token, out = moves.token[assignment], jnp.zeros((N, D))
  for expert in range(E):
    w = {name: value[expert] for name, value in weights.items()}
    mine = (row >= ends[expert] - sizes[expert]) & (row < ends[expert])
    out = jnp.where(mine[:, None], feed_forward(x[token], w, None, NETWORK), out)
  return jnp.zeros_like(x).at[token].add(out * weight[assignment][:, None])


def blocked(x, weight, weights, moves, sizes):
  return blocked_experts(network, BLOCKS, WeightOn.OUTPUT, x, weight, moves, sizes, weights, None)


def by_products(x, weight, weights, moves, sizes):
  kernel = GroupedKernel.TRITON
  return grouped_experts(network, x, weight, moves, sizes, weights, kernel=kernel)


def both(fn):
  """Makes a function give its value and its gradients by tokens and both kinds of weights."""

  def run(x, weight, weights, cotangent, moves, sizes):
    out, vjp = jax.vjp(lambda *args: fn(*args, moves, sizes), x, weight, weights)
    return out, *vjp(cotangent)

  return run


@functools.cache
def compiled(fn):
  """Returns values and gradients, compiled once for all sizes."""
  return jax.jit(both(fn), compiler_options=FAST_COMPILE)


def assert_equals_loop(run, name):
  sizes = jnp.array(SIZES[name], jnp.int32)
  args = (*make(), make_moves(SIZES[name]), sizes)
  actual, expected = run(*args), compiled(loop)(*args)
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert relative_error(a, b) <= TOLERANCE
  return actual


@pytest.mark.parametrize("name", SIZES)
def test_blocks_equal_a_loop(name):
  assert_equals_loop(compiled(blocked), name)


@pytest.mark.parametrize("name", SIZES)
def test_grouped_products_equal_a_loop(name, monkeypatch):
  # The kernels themselves have tests of their own; this is the road from tokens to sums.
  monkeypatch.setitem(grouped._KERNELS, GroupedKernel.TRITON, RaggedDot())
  assert_equals_loop(compiled(by_products), name)


def test_an_expert_without_rows_gets_exactly_no_gradient():
  _, _, _, dweights = assert_equals_loop(compiled(blocked), "holes")
  for value in dweights.values():
    assert not np.any(value[0]) and not np.any(value[2])
    assert np.any(value[1]) and np.any(value[3])


def test_a_token_without_a_row_reaches_nothing():
  x, weight, weights, cotangent = make(num_tokens=N)
  sizes = SIZES["rows_beyond_the_sum"]
  moves = make_moves(sizes, top_k=1)
  idle = np.asarray(moves.row) == N
  rest = (weight, weights, jnp.where(idle[:, None], jnp.nan, cotangent), moves, jnp.array(sizes))
  clean = compiled(blocked)(x, *rest)
  spoilt = compiled(blocked)(jnp.where(idle[:, None], jnp.nan, x), *rest)
  jax.tree.map(np.testing.assert_array_equal, spoilt, clean)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(spoilt))
  assert idle.any() and not np.any(spoilt[0][idle])


def test_one_experts_overflow_stays_its_own():
  x, weight, weights, cotangent = make(num_tokens=N)
  moves = make_moves(SIZES["even"], top_k=1)
  row = np.asarray(moves.row)
  hit = (row >= 5) & (row < 10)
  spoilt = jnp.where(hit[:, None], jnp.inf, x)
  sizes = jnp.array(SIZES["even"], jnp.int32)
  y, dx, dweight, dweights = compiled(blocked)(spoilt, weight, weights, cotangent, moves, sizes)
  for value in (y, dx, dweight):
    assert np.all(np.isfinite(value[~hit]))
  for value in dweights.values():
    assert np.all(np.isfinite(np.delete(value, 1, axis=0)))


def test_bfloat16_sums_accumulate_in_float32():
  # 4,096 equal rows: a bfloat16 running sum would stop growing near 256 of them.
  count = 4096
  each = jnp.arange(count, dtype=jnp.int32)
  x, w = jnp.ones((1, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16)
  moves = Moves(jnp.zeros(count, jnp.int32), each, each, 1, count)
  sizes = jnp.array([count], jnp.int32)

  def apply(x, w):
    def linear(x, w, key, product, last_product):
      return last_product(x, w)

    return blocked_experts(linear, (1,), WeightOn.OUTPUT, x, jnp.ones(count), moves, sizes, w, None)

  out, vjp = jax.vjp(jax.jit(apply), x, w)
  for value in (out, *vjp(jnp.ones_like(out))):
    assert value.dtype == jnp.bfloat16
    assert float(value.ravel()[0]) == count


def noisy(x, w, key, product, last_product):
  return x * jax.random.uniform(key, x.shape)


@functools.partial(jax.jit, static_argnums=1)
def run_noisy(x, top_k):
  sizes = jnp.array(SIZES["even"], jnp.int32)
  keys = jax.random.split(jax.random.key(0), E)
  moves, weight = make_moves(SIZES["even"], top_k), jnp.ones(N)
  return blocked_experts(
    noisy, BLOCKS, WeightOn.OUTPUT, x, weight, moves, sizes, jnp.zeros((E, 1)), keys
  )


def test_each_block_draws_its_own_numbers():
  out = run_noisy(jnp.ones((N, D)), top_k=1)
  assert len(np.unique(np.asarray(out))) == N * D


def test_the_gradient_draws_the_numbers_of_the_forward_pass():
  x, _, _, cotangent = make()
  out, vjp = jax.vjp(lambda x: run_noisy(x, K), x)
  # y is linear in x, so <dy, y> = <dx, x>, if and only if both passes multiply by the same noise.
  np.testing.assert_allclose(jnp.vdot(cotangent, out), jnp.vdot(vjp(cotangent)[0], x), rtol=1e-5)


@pytest.mark.parametrize(
  ("num_rows", "num_experts", "expected"),
  [
    (1, 64, (32,)),
    (768, 8, (64, 32)),
    (767, 8, (32,)),
    (6144, 8, (512, 128, 32)),
    (24576, 64, (256, 64, 32)),
    (10**6, 8, (512, 128, 32)),
  ],
)
def test_blocks_follow_the_mean_load(num_rows, num_experts, expected):
  assert block_lengths(num_rows, num_experts) == expected


def test_auto_is_the_platforms_kernel_and_says_so_once(monkeypatch):
  said = []
  monkeypatch.setattr(grouped.logging, "info", lambda text, *args: said.append(text % args))
  grouped.platform_kernel.cache_clear()
  assert grouped.resolve_kernel(GroupedKernel.AUTO) == GroupedKernel.BLOCKED
  assert grouped.resolve_kernel("auto") == GroupedKernel.BLOCKED
  assert said == ["grouped_kernel = auto: using blocked on platform cpu"]
  monkeypatch.setattr(grouped.jax, "default_backend", lambda: "tpu")
  assert grouped.resolve_kernel(GroupedKernel.AUTO) == GroupedKernel.MEGABLOX
  assert grouped.resolve_kernel(GroupedKernel.TRITON) == GroupedKernel.TRITON
  assert len(said) == 2


def test_an_unknown_kernel_names_the_nearest():
  with pytest.raises(UserError, match=r"grouped_kernel = 'megablocks'.*megablox"):
    grouped.resolve_kernel("megablocks")


def test_a_kernel_that_no_other_form_of_dispatch_would_use_is_refused():
  with pytest.raises(UserError, match=r"grouped_kernel = triton with dispatch = gather.*ragged"):
    MoEConfig(RoutingConfig(4), hidden_dim=8, grouped_kernel="triton")
