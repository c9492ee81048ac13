"""The selective scan equals its loop, values and gradients, whatever the chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from oracles import finite_differences, mamba

from moe_jax.layers.selective_scan import selective_scan

# Float32 sums of tens of terms against float64.
TOLERANCE = 1e-5
B, L, CHANNELS, N = 2, 7, 3, 2
CHUNKS = (1, 3, 7, 50)
RNG = np.random.default_rng(0)
# A token that leaves the state as it is, and one that forgets it.
STEPS = np.abs(RNG.normal(size=(B, L, CHANNELS))) * np.array([1, 1, 0, 1, 1, 1, 0])[None, :, None]
STARTS = np.array([[0] * L, [1, 0, 0, 0, 1, 0, 0]], bool)
GIVEN = {
  "x_BLI": RNG.normal(size=(B, L, CHANNELS)),
  "step_BLI": STEPS,
  "decay_NI": -np.exp(RNG.normal(size=(N, CHANNELS))),
  "write_BLN": RNG.normal(size=(B, L, N)),
  "read_BLN": RNG.normal(size=(B, L, N)),
  "state_BNI": RNG.normal(size=(B, N, CHANNELS)),
}
COTANGENTS = RNG.normal(size=(B, L, CHANNELS)), RNG.normal(size=(B, N, CHANNELS))


def loop(given, row):
  """Returns the oracle's y (L, I) and last state of a row."""
  of_row = {name: a[row] if "_B" in name else a for name, a in given.items()}
  tokens = (of_row[name] for name in ("x_BLI", "step_BLI", "decay_NI", "write_BLN", "read_BLN"))
  return mamba.selective_scan(*tokens, STARTS[row], of_row["state_BNI"])


@functools.partial(jax.jit, static_argnames="chunk")
def scan(given, chunk):
  return selective_scan(**given, starts_BL=jnp.asarray(STARTS), chunk=chunk)


@functools.partial(jax.jit, static_argnames="chunk")
@jax.grad
def gradient(given, chunk):
  """Returns the gradient of the products of both results with the cotangents."""
  return sum(jnp.sum(a * b) for a, b in zip(scan(given, chunk), COTANGENTS, strict=True))


def float32(given):
  return {name: jnp.asarray(value, jnp.float32) for name, value in given.items()}


@pytest.mark.parametrize("chunk", CHUNKS)
def test_values_are_those_of_the_loop(chunk):
  y, state = scan(float32(GIVEN), chunk)
  for row in range(B):
    for mine, theirs in zip((y[row], state[row]), loop(GIVEN, row), strict=True):
      assert relative_error(mine, theirs) <= TOLERANCE


@pytest.fixture(scope="module")
def wanted():
  """The gradient of the loop by finite differences, by the argument's name."""

  def objective(name, value):
    given = GIVEN | {name: value}
    rows = [loop(given, row) for row in range(B)]
    return sum(
      np.sum(COTANGENTS[0][row] * y) + np.sum(COTANGENTS[1][row] * state)
      for row, (y, state) in enumerate(rows)
    )

  return {
    name: finite_differences.gradient(functools.partial(objective, name), value)
    for name, value in GIVEN.items()
  }


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_are_those_of_the_loop(chunk, wanted):
  found = gradient(float32(GIVEN), chunk)
  for name, theirs in wanted.items():
    assert relative_error(found[name], theirs) <= TOLERANCE, name


def test_a_call_may_go_on_where_another_ended():
  given = float32(GIVEN)
  whole, last = scan(given, 3)
  state, parts = given["state_BNI"], []
  for part in (slice(0, 1), slice(1, 5), slice(5, L)):
    of_tokens = {name: a[:, part] for name, a in given.items() if "_BL" in name}
    y, state = selective_scan(
      **of_tokens,
      decay_NI=given["decay_NI"],
      starts_BL=jnp.asarray(STARTS[:, part]),
      state_BNI=state,
      chunk=2,
    )
    parts.append(y)
  assert relative_error(np.concatenate(parts, axis=1), whole) <= TOLERANCE
  assert relative_error(state, last) <= TOLERANCE


@pytest.mark.parametrize("differentiate", [False, True])
def test_memory_grows_slower_than_all_states(differentiate):
  def temporary(length):
    shapes = {"x_BLI": (1, length, 64), "step_BLI": (1, length, 64), "decay_NI": (16, 64)}
    shapes |= {"write_BLN": (1, length, 16), "read_BLN": (1, length, 16), "state_BNI": (1, 16, 64)}
    given = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def total(given):
      starts = jnp.zeros((1, length), bool)
      return jnp.sum(selective_scan(**given, starts_BL=starts, chunk=32)[0])

    program = jax.jit(jax.grad(total) if differentiate else total)
    return program.lower(given).compile().memory_analysis().temp_size_in_bytes

  few, many = temporary(1024), temporary(4096)
  # A state a token would be 4 * 64 * 16 bytes each; inputs, outputs and their gradients are the
  # tenth of it.
  assert many - few < 0.5 * (4096 - 1024) * 4 * 64 * 16


def test_a_start_forgets_even_what_is_not_finite():
  given = float32(GIVEN)
  given["state_BNI"] = jnp.full((B, N, CHANNELS), jnp.inf)
  y, state = scan(given, 3)
  assert np.isfinite(y[1]).all() and np.isfinite(state[1]).all()
