"""What presets do not vary: biases, weights before experts, small batches, lower precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sharding.layer_on_a_mesh import PATHS, D, E, F, assert_close, counts, layer_config, run
from sharding.meshes import mesh_layout

from moe_jax.errors import UserError
from moe_jax.moe import MoEConfig, MoELayer, RoutingConfig
from moe_jax.sharding.context import use_layout

ROUTER = RoutingConfig(E, top_k=2, grouping="fixed", group_size=8)
KEY = jax.random.key(0)


def _config(dispatch, routing=ROUTER, **changes) -> MoEConfig:
  fields = dict(hidden_dim=F, gated=True, activation="silu", dispatch=dispatch)
  return MoEConfig(routing=routing, **fields | changes)


@pytest.mark.parametrize(
  ("path", "mesh"),
  [("gather", "ep_tp"), ("ragged", "ep_fsdp_tp"), ("ring", "tp"), ("compiler", "tp")],
)
def test_biases_are_split_and_added_once(path, mesh):
  dispatch, fields = PATHS[path]
  config = _config(dispatch, expert_bias=True, clamp=7.0)
  layout = mesh_layout(mesh, **fields)
  assert_close(run(config, layout), run(config, None))


@pytest.mark.parametrize("path", ["gather", "ragged", "ring", "compiler"])
def test_weights_before_the_expert_travel_with_the_rows(path):
  dispatch, fields = PATHS[path]
  routing = dataclasses.replace(ROUTER, top_k=1, weight_on="input", weighting="raw")
  config = _config(dispatch, routing)
  assert_close(run(config, mesh_layout("ep_fsdp", **fields)), run(config, None))


def test_rows_that_travel_in_steps_come_back_to_their_tokens():
  config = _config("gather")
  layout = mesh_layout("ep_wide", hierarchical=True)
  assert_close(run(config, layout), run(config, None))


@pytest.mark.parametrize("path", ["gather", "ragged"])
def test_all_tokens_may_want_the_experts_of_one_device(path):
  dispatch, fields = PATHS[path]
  config = _config(dispatch, dataclasses.replace(ROUTER, overflow="dropless"))
  layer = MoELayer(D, config, key=jax.random.key(0))
  kernel = layer.router.kernel[...]
  x = np.random.default_rng(0).standard_normal((16, 8, D)).astype(np.float32)
  x[..., 0] = 1.0
  layer.router.kernel[...] = kernel.at[0, :2].add(100.0)
  outputs = [_apply(layer, x, layout) for layout in (None, mesh_layout("ep_wide", **fields))]
  assert float(outputs[0][1]) == 0.0
  assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_a_batch_too_small_to_split_is_decoded_by_all_devices(tokens):
  config = _config("ragged", RoutingConfig(E, top_k=2, overflow="dropless"))
  layer = MoELayer(D, config, key=jax.random.key(0))
  x = np.random.default_rng(0).standard_normal((tokens, 1, D)).astype(np.float32)
  want = _apply(layer, x, None)
  assert_close(_apply(layer, x, mesh_layout("ep_tp", exchange="all_gather")), want)


def test_ragged_rows_need_no_whole_groups():
  routing = RoutingConfig(E, top_k=2, overflow="dropless")
  got = run(_config("ragged", routing), mesh_layout("ep_fsdp"))
  assert_close(got, run(_config("ragged", routing), None))


def test_activations_of_lower_precision_agree_as_far_as_they_can():
  config = _config("gather")
  layer = MoELayer(D, config, key=jax.random.key(0))
  x = np.random.default_rng(0).standard_normal((16, 8, D)).astype(jnp.bfloat16)
  outputs = [_apply(layer, x, layout)[0] for layout in (None, mesh_layout("ep_fsdp_tp"))]
  # Two halves of a hidden width, summed apart, are each rounded to eight bits.
  assert_close(outputs[1].astype(np.float32), outputs[0].astype(np.float32), 2**-6)


def test_dropout_draws_masks_of_its_own_on_every_device():
  config = _config("gather", expert_dropout=0.5)
  layer = MoELayer(D, config, key=jax.random.key(0))
  row = np.random.default_rng(0).standard_normal((1, 8, D)).astype(np.float32)
  y, _ = _apply(layer, np.repeat(row, 16, 0), mesh_layout("dp"), train=True, key=jax.random.key(1))
  first_of_each = y[::2]
  assert len(np.unique(first_of_each.round(4), axis=0)) == 8


def test_devices_that_share_all_tokens_draw_the_same_masks():
  layout = mesh_layout("ep", exchange="all_gather")
  layer = MoELayer(D, _config("gather", RoutingConfig(E, top_k=2), expert_dropout=0.5), key=KEY)
  graph, state = nnx.split(layer)
  x = np.random.default_rng(0).standard_normal((16, 8, D)).astype(np.float32)

  def forward(state, x):
    with use_layout(layout):
      return nnx.merge(graph, state)(x, train=True, key=jax.random.key(1))[0]

  y = jax.jit(forward, out_shardings=layout.replicated)(state, x)
  first, *others = [np.asarray(each.data) for each in y.addressable_shards]
  for other in others:
    np.testing.assert_array_equal(other, first)


def test_counts_of_a_preset_with_drops_are_not_zero():
  config = layer_config("switch", "gather")
  assert counts(run(config, mesh_layout("ep")))["dropped_fraction"] > 0.05


@pytest.mark.parametrize(
  ("path", "mesh", "form", "message"),
  [
    (
      "gather",
      "ep",
      None,
      r"1 routing groups of 128 tokens do not split into 8 equal parts \(data = 2 x expert = 4\).*"
      " group_size = 16, a smaller mesh, or exchange = all_gather",
    ),
    ("compiler", "ep", None, "1 routing groups of 128 tokens do not split into 8"),
    ("compiler", "ep", "gather", "exchange = compiler is refused with dispatch = gather"),
    ("staged", "ep_wide", "ragged", "hierarchical = true is refused with dispatch = ragged"),
  ],
)
def test_what_a_mesh_cannot_do_is_refused(path, mesh, form, message):
  dispatch, fields = PATHS[path]
  config = _config(form or dispatch, RoutingConfig(E, top_k=2))
  with pytest.raises(UserError, match=message):
    run(config, mesh_layout(mesh, **fields))


@pytest.mark.parametrize(
  ("chunks", "ways"),
  [
    (2, "group_size = 8, chunks = 1, a smaller mesh, or exchange = all_gather with chunks = 1"),
    # 128 tokens do not make 24 groups.
    (3, "holds whole groups: use chunks = 1, a smaller mesh"),
  ],
)
def test_what_is_advised_against_chunks_would_do(chunks, ways):
  config = _config("gather", dataclasses.replace(ROUTER, group_size=16))
  with pytest.raises(UserError, match=ways):
    run(config, mesh_layout("ep", chunks=chunks))


def test_experts_that_the_mesh_does_not_divide_are_refused():
  config = _config("gather", dataclasses.replace(ROUTER, num_experts=6))
  with pytest.raises(
    UserError, match="the axis expert of .*experts.* has size 6, which expert = 4"
  ):
    run(config, mesh_layout("ep"))


def _apply(layer, x, layout, **call):
  """Returns the output and the dropped fraction."""
  graph, state = nnx.split(layer)

  def forward(state, x):
    with use_layout(layout):
      y, aux = nnx.merge(graph, state)(x, **call)
    return y, aux.plan.metrics["dropped_fraction"]

  return jax.device_get(jax.jit(forward)(state, x))
