"""The ragged all-to-all for platforms without one, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.moe.ragged_exchange import Trip, padded_ragged_all_to_all
from moe_jax.sharding.mesh import MESH_AXES, make_mesh

N, R, D = 4, 6, 3
SIZES = {
  "mixed": [[1, 2, 0, 3], [0, 0, 0, 0], [6, 0, 0, 0], [1, 1, 1, 1]],
  "one": [[0, 0, 6, 0]] * 4,
  "none": [[0] * 4] * 4,
}


def _on_each(function):
  mesh = make_mesh(dict.fromkeys(MESH_AXES, 1) | {"expert": N}, jax.devices()[:N])
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
  )
  return jax.jit(mapped)


def _there_and_back(rows, sizes):
  """Returns what arrives on each device, and what comes back when each doubles its rows."""

  def run(rows):
    trip = Trip.between(jnp.asarray(sizes), jax.lax.axis_index("expert"))
    arrived = trip.send(rows, jnp.zeros((N * R, D)), ("expert",), "cpu")
    return arrived, trip.back().send(2 * arrived, jnp.zeros_like(rows), ("expert",), "cpu")

  return _on_each(run)(rows)


@pytest.mark.parametrize("case", SIZES)
def test_rows_arrive_by_source_and_come_back_to_their_places(case):
  sizes = np.array(SIZES[case], np.int32)
  rows = np.arange(N * R * D, dtype=np.float32).reshape(N, R, D) + 1
  arrived, back = _there_and_back(rows.reshape(-1, D), sizes)
  want = np.zeros((N, N * R, D), np.float32)
  came = np.zeros((N, R, D), np.float32)
  for here in range(N):
    place = 0
    for source in range(N):
      start = sizes[source, :here].sum()
      for i in range(sizes[source, here]):
        want[here, place] = rows[source, start + i]
        place += 1
    came[here, : sizes[here].sum()] = 2 * rows[here, : sizes[here].sum()]
  np.testing.assert_array_equal(arrived.reshape(want.shape), want)
  np.testing.assert_array_equal(back.reshape(came.shape), came)


def test_what_was_in_the_output_stays_where_nothing_arrives():
  def run(rows):
    zeros = jnp.zeros((N,), jnp.int32)
    room = jnp.full((2, D), 7.0)
    return padded_ragged_all_to_all(rows, room, zeros, zeros, zeros, zeros, axis_name="expert")

  assert np.all(np.asarray(_on_each(run)(jnp.zeros((N * R, D)))) == 7.0)


def test_the_gradient_of_a_trip_is_the_trip_back():
  sizes = np.array(SIZES["mixed"], np.int32)
  rows = jnp.ones((N * R, D))
  scale = jnp.arange(N * R, dtype=jnp.float32)[:, None]
  gradient = jax.grad(lambda rows: jnp.sum(_there_and_back(rows, sizes)[1] * scale))(rows)
  sent = np.arange(R)[None] < sizes.sum(1)[:, None]
  want = 2 * np.where(sent.reshape(-1, 1), scale, 0.0) * np.ones((1, D))
  np.testing.assert_allclose(gradient, want, rtol=1e-6)
