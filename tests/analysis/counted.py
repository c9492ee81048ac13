"""One call of a router, and its counts: shared by the tests on one device and on several."""

import jax
import numpy as np

from moe_jax.analysis.routing_counts import RoutingCounts, count_routing

E, K = 4, 2


def draw_call(seed=0, num_tokens=64):
  """Returns the arguments of `count_routing` but the slots: ids, masks, probabilities, logits."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(num_tokens, E)).astype(np.float32) + np.linspace(0, 1, E, dtype="f4")
  probs = np.asarray(jax.nn.softmax(logits, axis=-1))
  expert = np.argsort(-logits, axis=-1)[:, :K].astype(np.int32)
  mask = rng.random(num_tokens) < 0.8
  asked = np.repeat(mask[:, None], K, axis=1)
  kept = asked & (rng.random((num_tokens, K)) < 0.7)
  return expert, asked, kept, probs, logits, mask


def assert_counts_equal(actual: RoutingCounts, expected: RoutingCounts) -> None:
  """Compares integers exactly, and float32 sums of dozens of terms to rounding."""

  def compare(a, b):
    assert a.dtype == b.dtype
    if np.issubdtype(a.dtype, np.integer):
      np.testing.assert_array_equal(a, b)
    else:
      np.testing.assert_allclose(a, b, rtol=2e-6)

  jax.tree.map(compare, actual, expected)


def count_over_devices() -> None:
  """Checks that the psum of the devices' counts is the count of all tokens."""
  assert jax.device_count() == 8
  call, slots = draw_call(), 24
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

  def local(*arrays):
    return jax.lax.psum(count_routing(*arrays, num_slots=slots), "data")

  data, everywhere = jax.P("data"), jax.P()
  summed = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(data,) * 6, out_specs=everywhere))
  whole = jax.jit(lambda *arrays: count_routing(*arrays, num_slots=8 * slots))(*call)
  assert_counts_equal(summed(*call), whole)
  assert int(whole.tokens) > 0


if __name__ == "__main__":
  count_over_devices()
