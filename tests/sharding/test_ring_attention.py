"""Ring attention on eight devices against attention on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharding.layer_on_a_mesh import FAST_COMPILE

from moe_jax.errors import UserError
from moe_jax.layers.attend import attend
from moe_jax.layers.attention_context import Places, attention_mask
from moe_jax.sharding.config import ShardingConfig
from moe_jax.sharding.context import use_layout
from moe_jax.sharding.layout import make_layout

B, L, H, N, K = 2, 16, 4, 2, 8
MESHES = {
  "ring_of_8": {"sequence": 8},
  "data_and_tensor": {"layout": "tp", "data": 2, "sequence": 2, "tensor": 2},
}
# What `attention_mask` and `attend` are given: every mask and every option once.
CASES = {
  "causal": {},
  "encoder": {"causal": False},
  "window": {"window": 5},
  "chunk": {"chunk": 6},
  "segments_and_padding": {"segments": True, "padding": True},
  "sinks": {"sinks": True},
  "bias": {"bias": True},
  "all_at_once": {"window": 7, "segments": True, "padding": True, "sinks": True, "bias": True},
  "one_head_a_key": {"kv_heads": H},
  "wider_values": {"value_dim": 12, "scale": 0.3},
  "other_length_of_keys": {"keys": 24},
}


def _case(options):
  """Returns what `attend` differentiates, its mask, and its scale."""
  rng = np.random.default_rng(0)
  heads, M = options.get("kv_heads", N), options.get("keys", L)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  arrays = {
    "q": draw(B, L, H, K),
    "k": draw(B, M, heads, K),
    "v": draw(B, M, heads, options.get("value_dim", K)),
    "bias": draw(H, B, L, M) if "bias" in options else None,
    "sinks": draw(H) if "sinks" in options else None,
  }
  if M != L:
    # As an encoder's output is seen, by one query not at all.
    mask = jnp.asarray(rng.random((B, L, M)) < 0.5).at[0, 3].set(False)
    return arrays, mask, None
  real = jnp.arange(L)[None] < jnp.asarray([[L], [L - 3 if "padding" in options else L]])
  positions = jnp.broadcast_to(jnp.arange(L), (B, L))
  segments = jnp.where(positions < 7, 1, 2) if "segments" in options else None
  causal = options.get("causal", True)
  places = Places(jnp.arange(L), positions, positions, real, segments, causal=causal)
  mask = attention_mask(places, window=options.get("window"), chunk=options.get("chunk"))
  return arrays, mask, options.get("scale")


def _run(options, layout):
  arrays, mask, scale = _case(options)

  def loss(arrays):
    with use_layout(layout):
      q, k, v, bias, sinks = (arrays[name] for name in ("q", "k", "v", "bias", "sinks"))
      out = attend(q, k, v, mask, scale=scale, bias_HBLM=bias, sinks_H=sinks)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return jnp.sum(out * weights), out

  return jax.device_get(
    jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST_COMPILE)(arrays)
  )


def _layout(mesh, **fields):
  return make_layout(ShardingConfig(**MESHES[mesh] | fields), jax.devices())


@pytest.mark.parametrize(
  ("mesh", "case"),
  [*(("data_and_tensor", case) for case in CASES), ("ring_of_8", "all_at_once")],
)
def test_a_ring_gives_the_output_and_gradients_of_one_device(mesh, case):
  got = _run(CASES[case], _layout(mesh, context="ring"))
  want = _run(CASES[case], None)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    # Sums of up to 24 float32 terms of order 1, taken in another order.
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.max(np.abs(b))))


def test_no_device_of_a_ring_gathers_keys():
  arrays, mask, _ = _case({})

  def out(arrays, context):
    with use_layout(_layout("ring_of_8", context=context)):
      return jnp.sum(attend(arrays["q"], arrays["k"], arrays["v"], mask))

  def program(context):
    places = _layout("ring_of_8").sharding((None, "length", None, None), arrays["q"].shape)
    placed = {name: jax.device_put(arrays[name], places) for name in ("q", "k", "v")}
    step = jax.jit(jax.grad(lambda arrays: out(arrays, context)))
    return step.lower(placed).compile().as_text()

  assert "all-gather(" not in program("ring") and "collective-permute(" in program("ring")
  assert "all-gather(" in program("all_gather")


def test_a_length_that_the_ring_does_not_divide_is_refused():
  q = jnp.zeros((B, 12, H, K))
  with use_layout(_layout("ring_of_8", context="ring")):
    with pytest.raises(UserError, match="12 queries .* sequence = 8: make them 8 or 16"):
      attend(q, q, q, jnp.ones((B, 12, 12), bool))


def test_a_ring_of_one_is_refused():
  with pytest.raises(UserError, match="context = ring is refused with sequence = 1"):
    ShardingConfig(context="ring")
