"""What the compiler makes of a layer on a mesh: which exchanges, products and memory."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from sharding.meshes import mesh_layout

from moe_jax.moe import MoEConfig, MoELayer, RoutingConfig
from moe_jax.planning.collectives import CollectiveKind, find_collectives
from moe_jax.planning.hlo import parse_program
from moe_jax.planning.memory import padded_exchange_bytes
from moe_jax.planning.program_costs import program_costs
from moe_jax.sharding.context import use_layout

E, D, F, B, L = 16, 64, 128, 16, 128
GROUP = 128


def _config(dispatch) -> MoEConfig:
  routing = RoutingConfig(
    E, top_k=2, grouping="fixed", group_size=GROUP, capacity_factor=1.0, overflow="drop"
  )
  return MoEConfig(routing, hidden_dim=F, gated=True, activation="silu", dispatch=dispatch)


def _compile(config, layout, train):
  """Compiles the forward pass, or the gradients of a layer, as on a pod: nothing is run."""
  graph, params, rest = nnx.split(MoELayer(D, config, key=jax.random.key(0)), nnx.Param, ...)

  def forward(params, x):
    with use_layout(layout):
      return nnx.merge(graph, params, rest)(x, train=True)

  def objective(params, x):
    y, aux = forward(params, x)
    return jnp.sum(y**2) + aux.weighted_loss

  places = layout.of_tree(params), layout.sharding(("batch", "length", None), (B, L, D))
  function = jax.grad(objective, argnums=(0, 1)) if train else lambda *args: forward(*args)[0]
  out = places if train else places[1]
  compiled = jax.jit(function, in_shardings=places, out_shardings=out)
  return compiled.lower(params, jax.ShapeDtypeStruct((B, L, D), jnp.float32)).compile()


def _collectives(compiled, layout, kind):
  found = find_collectives(parse_program(compiled.as_text()), layout.mesh)
  return [each for each in found if each.kind == kind]


@pytest.mark.parametrize(("train", "count"), [(False, 2), (True, 4)])
@pytest.mark.parametrize(
  ("dispatch", "exchange"),
  [("einsum", "compiler"), ("einsum", "all_to_all"), ("gather", "all_to_all")],
)
def test_tokens_travel_there_and_back_and_are_never_gathered(dispatch, exchange, train, count):
  layout = mesh_layout("ep_fsdp", exchange=exchange)
  compiled = _compile(_config(dispatch), layout, train)
  sent = _collectives(compiled, layout, CollectiveKind.ALL_TO_ALL)
  assert [each.axes for each in sent] == [("expert",)] * count
  rows = E * GROUP * 2 // E
  tokens_of_a_device = B * L // 8 // GROUP
  assert {each.num_bytes for each in sent} == {4.0 * rows * tokens_of_a_device * D}
  gathered = _collectives(compiled, layout, CollectiveKind.ALL_GATHER)
  # Three matrices of the device's experts, and the router.
  weights = {4.0 * E // 2 * D * F, 4.0 * D * E}
  assert {each.num_bytes for each in gathered} == weights


@pytest.mark.parametrize("dispatch", ["gather", "ragged"])
def test_gradients_of_experts_are_reduce_scattered_under_fsdp(dispatch):
  layout = mesh_layout("ep_fsdp")
  compiled = _compile(_config(dispatch), layout, True)
  scattered = _collectives(compiled, layout, CollectiveKind.REDUCE_SCATTER)
  assert [each.axes for each in scattered] == [("fsdp",)] * 3
  whole = 4.0 * E // 2 * D * F
  assert {each.num_bytes for each in scattered} == {whole}
  for each in _collectives(compiled, layout, CollectiveKind.ALL_REDUCE):
    assert each.num_bytes < whole or "fsdp" not in each.axes


@pytest.mark.parametrize("mesh", ["ep", "ep_tp", "ep_wide"])
def test_a_device_multiplies_its_own_rows_alone(mesh):
  layout = mesh_layout(mesh)
  program = parse_program(_compile(_config("gather"), layout, True).as_text())
  rows = B * L * 2 / 8
  tensor = layout.parts("expert_mlp")
  # Three products forward and six backward, of as many rows as there are slots; devices that share
  # a hidden width share rows too.
  experts = 9 * 2 * rows * D * F
  router = 3 * 2 * (B * L / 8 * tensor) * D * E
  assert program_costs(program).flops == pytest.approx(experts + router, rel=0.02)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("mesh", ["ep", "ep_wide"])
def test_the_padded_form_needs_the_memory_of_its_formula(mesh, train):
  # Gathered weights would come on top.
  config, layout = _config("gather"), mesh_layout(mesh, data=2, fsdp=1, expert=4)
  stats = _compile(config, layout, train).memory_analysis()
  want = padded_exchange_bytes(config, D, B * L // 8, train=train)
  assert stats.temp_size_in_bytes == pytest.approx(want, rel=0.1)
