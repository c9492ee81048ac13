"""Router logits of every projection equal the oracle's, with gradients, and belong to training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import relative_error
from flax import nnx
from moe.compiled import FAST_COMPILE
from oracles import finite_differences, projections
from tiny_models import tiny_config

from moe_jax.moe import MoEConfig, MoELayer, RoutingConfig, preset
from moe_jax.moe.router import Router
from moe_jax.planning.count import count_parameters
from moe_jax.training.optimizer import decayed
from moe_jax.training.state import init_state

D, E, S = 6, 4, 5
# Sums of six float32 products, over a length.
TOLERANCE = 1e-5
PARAMETER = {"affine": "logit_bias", "normalized": "logit_scale"}
ORACLE = {"affine": projections.affine, "normalized": projections.normalized}


@functools.cache
def router(projection):
  """Returns the graph and a state with random values in every place."""
  config = RoutingConfig(E, projection=projection)
  graph, state = nnx.split(Router(D, config, key=jax.random.key(0), scale=1.0))
  rng = np.random.default_rng(3)
  return graph, jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape) + 0.3), state)


def tokens():
  x = np.random.default_rng(1).normal(size=(1, S, D)).astype(np.float32)
  # Padding may be zeros, whose length has no inverse.
  x[0, 3] = 0.0
  return x


def parts(state, projection):
  return [np.float64(state[name][...]) for name in ("kernel", PARAMETER[projection])]


@pytest.mark.parametrize("projection", ORACLE)
def test_logits_and_gradients_equal_the_oracle(projection):
  graph, state = router(projection)
  x, cotangent = tokens(), np.random.default_rng(2).normal(size=(1, S, E)).astype(np.float32)

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def run(state, x):
    logits, vjp = jax.vjp(lambda s, x: nnx.merge(graph, s)(x)[0], state, x)
    return logits, *vjp(cotangent)

  logits, d_state, dx = run(state, x)
  oracle, (kernel, extra) = ORACLE[projection], parts(state, projection)
  assert relative_error(logits[0], oracle(np.float64(x[0]), kernel, extra)) <= TOLERANCE

  def objective(x_SD, kernel_DE, value):
    return np.sum(cotangent[0] * oracle(x_SD, kernel_DE, value))

  given = [np.float64(x[0]), kernel, extra]
  for index, own in enumerate([dx[0], d_state["kernel"], d_state[PARAMETER[projection]]]):
    own = own if index == 0 else own[...]
    # The small term under the root bends the length of a vector of zeros within a step.
    real = np.arange(S) != 3 if index == 0 else ...

    def changed(value, index=index):
      return np.array([objective(*given[:index], value, *given[index + 1 :])])

    right = finite_differences.gradient(changed, given[index])
    right = np.reshape(right, given[index].shape)
    assert relative_error(np.asarray(own)[real], right[real]) <= TOLERANCE
    assert np.all(np.isfinite(own))


def test_a_bfloat16_router_rounds_both_factors_and_the_product():
  kernel = np.random.default_rng(3).normal(size=(D, E)).astype(np.float32)
  logits = {}
  for dtype in ("float32", "bfloat16"):
    model = Router(D, RoutingConfig(E), key=jax.random.key(0), scale=1.0, dtype=dtype)
    model.kernel[...] = kernel
    logits[dtype] = model(tokens())[0]
  assert logits["bfloat16"].dtype == jnp.float32
  np.testing.assert_array_equal(
    logits["bfloat16"], jnp.astype(jnp.astype(logits["bfloat16"], jnp.bfloat16), jnp.float32)
  )
  exact = np.float64(tokens()) @ np.float64(kernel)
  assert relative_error(logits["float32"], exact) <= TOLERANCE
  # Two factors and their sum are each rounded to 8 bits.
  off = np.abs(logits["bfloat16"] - exact) / (np.abs(np.float64(tokens())) @ np.abs(kernel) + 1e-9)
  assert 2**-12 < off.max() < 3 * 2**-8


def test_at_first_the_bias_is_zero_and_the_scale_one():
  for projection, value in {"affine": 0.0, "normalized": 1.0}.items():
    layer = Router(D, RoutingConfig(E, projection=projection), key=jax.random.key(0), scale=1.0)
    assert np.all(getattr(layer, PARAMETER[projection])[...] == value)


def test_normalized_logits_do_not_depend_on_lengths():
  graph, state = router("normalized")
  model, x = nnx.merge(graph, state), tokens()[:, :3]
  before = model(x)[0]
  model.kernel[...] = 7.0 * model.kernel[...]
  assert relative_error(model(50.0 * x)[0], before) <= TOLERANCE
  assert np.all(np.abs(before) <= np.abs(model.logit_scale[...]) * (1 + 1e-6))


def layer_gradient(routing, x, mask, **fields):
  config = MoEConfig(routing, 3, **fields)
  graph, state = nnx.split(MoELayer(D, config, key=jax.random.key(0)))

  def loss(state):
    y, aux = nnx.merge(graph, state)(x, token_mask=mask)
    return jnp.sum(jnp.sin(y)) + aux.plan.losses["router_z"]

  return jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(state)["router"]


PRESETS = {
  "gpt_oss": ("logit_bias", dict(num_experts=E, top_k=2), {}),
  "soft_moe": ("logit_scale", dict(num_experts=E), {"dispatch": "einsum"}),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train_the_parameter_and_padding_does_not(name):
  parameter, sizes, fields = PRESETS[name]
  mask = np.arange(S)[None] < 3
  x, other = tokens(), tokens()
  other[~mask] = 5.0
  first, second = (
    layer_gradient(preset(name, **sizes), each, mask, **fields)[parameter][...]
    for each in (x, other)
  )
  assert np.any(np.abs(first) > 1e-4)
  np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("projection", ORACLE)
def test_the_parameter_is_counted_but_enters_no_product_and_is_not_decayed(projection):
  config = tiny_config(routing=dict(projection=projection))
  plain, count = count_parameters(tiny_config()), count_parameters(config)
  layers, size = len(config.moe_layers()), {"affine": E, "normalized": 1}[projection]
  assert count.total - plain.total == count.active - plain.active == layers * size
  assert count.matmul_active == plain.matmul_active
  mask = dict(nnx.to_flat_state(decayed(init_state(config, optax.sgd(0.1), 0).params)))
  own = {path[-1]: value for path, value in mask.items() if "router" in path}
  assert own == {"kernel": True, PARAMETER[projection]: False}
