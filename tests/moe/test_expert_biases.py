"""Biases inside experts: every form of dispatch equals the loops, and no idle slot adds one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from moe.compiled import FAST_COMPILE
from oracles import finite_differences, networks

from moe_jax.moe import MoEConfig, MoELayer, RoutingConfig

# Float32 sums of tens of products against float64.
TOLERANCE = 1e-5
B, L, D, F, E = 2, 4, 5, 3, 4
MASK = np.array([[1, 1, 1, 1], [0, 1, 1, 0]], bool)
# One slot an expert and group: some of the 8 assignments of a row are dropped, some slots idle.
ROUTING = dict(num_experts=E, top_k=2, capacity=1, grouping="sequence")


def config_of(dispatch, **routing):
  return MoEConfig(
    RoutingConfig(**ROUTING, **routing),
    F,
    gated=True,
    activation="shifted_quick_gelu",
    clamp=0.5,
    expert_bias=True,
    dispatch=dispatch,
  )


@functools.cache
def layer_of(config):
  """Returns the graph and parameters, biases of order 1."""
  layer = MoELayer(D, config, key=jax.random.key(0))
  for index, (path, param) in enumerate(nnx.to_flat_state(nnx.state(layer))):
    if path[-1].endswith("bias"):
      param.set_value(jax.random.normal(jax.random.key(index), param.get_value().shape))
  return nnx.split(layer)


@functools.partial(jax.jit, static_argnames=("graph",), compiler_options=FAST_COMPILE)
def run(graph, params, x, target):
  """Returns y, the plan, and the gradients of sum(y * target) by the parameters."""

  def total(params):
    y, aux = nnx.merge(graph, params)(x, token_mask=jnp.asarray(MASK))
    return jnp.sum(y * target), (y, aux.plan)

  (_, (y, plan)), grads = jax.value_and_grad(total, has_aux=True)(params)
  return y, plan, grads


def loops(x, experts, plan, *, on_input):
  """Returns (B, L, D): what the plan's assignments give with these experts."""
  y = np.zeros((B, L, D))
  for row, n in zip(*np.nonzero(np.asarray(plan.valid)), strict=True):
    token, weight = int(plan.token[row, n]), float(plan.weight[row, n])
    weights = {name: value[int(plan.expert[row, n])] for name, value in experts.items()}
    x_D = x[row, token] * (weight if on_input else 1.0)
    out = networks.network(x_D, weights, "shifted_quick_gelu", clamp=0.5)
    y[row, token] += out if on_input else out * weight
  return y


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("dispatch", ["einsum", "gather", "ragged"])
def test_biased_experts_equal_the_loops(dispatch, weight_on):
  config = config_of(dispatch, weight_on=weight_on)
  graph, params = layer_of(config)
  rng = np.random.default_rng(0)
  x, target = rng.normal(size=(2, B, L, D)).astype(np.float32)
  y, plan, grads = run(graph, params, jnp.asarray(x), jnp.asarray(target))
  assert 0 < np.sum(plan.valid) < 2 * np.sum(MASK)
  experts = jax.tree.map(np.float64, nnx.to_pure_dict(params)["experts"]["weights"])
  on_input = weight_on == "input"
  assert relative_error(y, loops(x, experts, plan, on_input=on_input)) <= TOLERANCE
  for name in ("gate_bias", "up_bias", "down_bias"):
    expected = finite_differences.gradient(
      lambda a, name=name: np.sum(loops(x, experts | {name: a}, plan, on_input=on_input) * target),
      experts[name],
    )
    actual = nnx.to_pure_dict(grads)["experts"]["weights"][name]
    assert relative_error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("dispatch", ["einsum", "gather", "ragged"])
def test_a_token_without_an_expert_gets_no_bias(dispatch):
  graph, params = layer_of(config_of(dispatch))
  x = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)
  y, plan, _ = run(graph, params, jnp.asarray(x), jnp.zeros((B, L, D)))
  served = np.zeros((B, L), bool)
  for row in range(B):
    served[row, np.asarray(plan.token)[row][np.asarray(plan.valid)[row]]] = True
  assert not served.all()
  assert not np.any(np.asarray(y)[~served]) and np.all(np.any(np.asarray(y)[served], axis=-1))
