"""What training owes the router: a gradient, clean inputs for experts, randomness by key alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moe.compiled import FAST_COMPILE, products, routed
from small_presets import small_preset

from moe_jax.errors import UserError
from moe_jax.moe import Dispatch, MoEConfig, MoELayer, RoutingConfig, preset, preset_names, route
from moe_jax.moe.router import Router

B, L, D, F, E = 2, 6, 8, 4, 4
KEY = jax.random.key(5)


def layer_of(routing, **fields):
  return MoELayer(D, MoEConfig(routing, F, **fields), key=jax.random.key(0))


def tokens(dtype=jnp.float32):
  return jax.random.normal(jax.random.key(1), (B, L, D)).astype(dtype)


LEARNED = [name for name in preset_names() if preset(name).selector.learned]


@pytest.mark.parametrize("name", LEARNED)
def test_the_language_models_loss_reaches_the_router_in_every_preset(name):
  routing = small_preset(name, E)
  dispatch = "einsum" if name == "soft_moe" else "gather"
  graph, state = nnx.split(layer_of(routing, dispatch=dispatch))
  # SparseMixer has a choice, and so a gradient, only where two logits are within 2 %.
  x = jax.random.normal(jax.random.key(1), (4, 64, D))
  cotangent = jax.random.normal(jax.random.key(2), x.shape)

  def loss(state, x):
    y, _ = nnx.merge(graph, state)(x, key=KEY, train=True)
    return jnp.sum(y * cotangent)

  gradient = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(state, x)
  kernel = np.asarray(gradient["router"]["kernel"][...])
  assert np.all(np.isfinite(kernel))
  # Far above rounding: outputs and inputs are of the order of 1.
  assert np.max(np.abs(kernel)) > 1e-3


@pytest.mark.parametrize(
  "weighting", ["renormalized", "renormalized_after_drop", "softmax_selected"]
)
def test_a_constant_weight_is_refused_in_training_alone(weighting):
  config = RoutingConfig(num_experts=E, top_k=1, weighting=weighting)
  logits = jax.random.normal(KEY, (1, L, E))
  with pytest.raises(UserError, match=f"weighting = {weighting} .*use weighting = raw"):
    config.check_trainable()
  with pytest.raises(UserError, match="use weighting = raw"):
    route(logits, config, train=True)
  plan = routed(logits, config)
  np.testing.assert_allclose(plan.weight, np.asarray(plan.valid, np.float32), atol=1e-6)


def test_hard_weights_are_refused_in_training_alone():
  config = RoutingConfig(num_experts=E, top_k=2, weighting="hard", overflow="dropless")
  logits = jax.random.normal(KEY, (1, L, E))
  with pytest.raises(UserError, match="weighting = hard .*use weighting = straight_through"):
    route(logits, config, train=True)
  assert np.all(np.asarray(routed(logits, config).weight) == 1)


def compile_layer(layer, train):
  """Returns a compiled function of (x, key)."""
  graph, state = nnx.split(layer)

  def run(x, key):
    return nnx.merge(graph, state)(x, key=key, train=train)

  return jax.jit(run, compiler_options=FAST_COMPILE)


@functools.cache
def compiled_layer(train, **fields):
  """Returns a compiled layer that drops nothing, with these fields of MoEConfig."""
  routing = RoutingConfig(num_experts=E, top_k=2, overflow="dropless")
  return compile_layer(layer_of(routing, **fields), train)


def test_jitter_changes_the_routers_input_in_training_alone():
  x = tokens()
  _, calm = compiled_layer(True)(x, KEY)
  _, jittered = compiled_layer(True, router_jitter=0.3)(x, KEY)
  _, other = compiled_layer(True, router_jitter=0.3)(x, jax.random.key(6))
  assert not np.allclose(jittered.router_logits, calm.router_logits)
  assert not np.allclose(jittered.router_logits, other.router_logits)
  y, evaluated = compiled_layer(False, router_jitter=0.3)(x, KEY)
  expected, clean = compiled_layer(False)(x, KEY)
  np.testing.assert_array_equal(evaluated.router_logits, clean.router_logits)
  np.testing.assert_array_equal(y, expected)


def test_jitter_multiplies_by_a_factor_around_one():
  # One logit of one input: the logit's factor is the input's.
  router = Router(1, RoutingConfig(num_experts=1), key=KEY, scale=1.0, jitter=0.3)
  x = jax.random.normal(KEY, (1, 4000, 1))
  factor = router(x, key=jax.random.key(6))[0] / router(x)[0]
  # Quotients of float32 numbers.
  assert 0.7 - 1e-5 < jnp.min(factor) < 0.71 and 1.29 < jnp.max(factor) < 1.3 + 1e-5
  # A uniform number of +-0.3 has a standard deviation of 0.17, the mean of 4,000 one of 0.0027.
  assert jnp.mean(factor) == pytest.approx(1.0, abs=5 * 0.0027)


def test_the_router_multiplies_in_full_precision_on_every_platform():
  # A TPU's default product of float32 numbers rounds them to bfloat16; on CPU none does.
  routing = RoutingConfig(num_experts=E, noise="learned")
  router = Router(D, routing, key=KEY, scale=1.0)
  assert products(lambda x: router(x)[0], tokens()) == ["HIGHEST"] * 2


def test_a_real_token_of_zeros_is_routed():
  x = tokens().at[0, :2].set(0.0)
  _, aux = compiled_layer(False)(x, KEY)
  assert float(aux.plan.metrics["assignments"]) == 2 * B * L
  assert np.all(aux.plan.valid)


def test_what_fills_the_last_group_up_is_not_routed():
  # 12 tokens in groups of 5.
  routing = RoutingConfig(num_experts=E, top_k=2, capacity=2, grouping="fixed", group_size=5)
  _, aux = compile_layer(layer_of(routing), False)(tokens(), KEY)
  assert aux.plan.valid.shape == (3, 10)
  assert float(aux.plan.metrics["assignments"]) == 2 * B * L
  assert not np.any(aux.plan.valid[2, 4:])


def test_experts_see_the_clean_input_under_jitter():
  # One expert with the constant weight 1: what it computes does not depend on the router.
  routing = RoutingConfig(num_experts=1, overflow="dropless")
  layers = [compile_layer(layer_of(routing, router_jitter=j), True) for j in (0.0, 0.9)]
  (calm, clean), (jittered, noisy) = (layer(tokens(), KEY) for layer in layers)
  assert not np.allclose(noisy.router_logits, clean.router_logits)
  np.testing.assert_array_equal(jittered, calm)


def test_random_second_needs_a_key_in_training_alone():
  config = preset("gshard", num_experts=E)
  logits = jax.random.normal(KEY, (2, L, E))
  with pytest.raises(UserError, match=r"random_second.*key = None.*jax\.random\.key"):
    route(logits, config, train=True)
  with pytest.raises(UserError, match=r"key = None.*jax\.random\.key"):
    layer_of(config)(tokens(), train=True)
  without_key = jax.jit(functools.partial(route, config=config), compiler_options=FAST_COMPILE)
  expected = without_key(logits)
  for seed in (1, 2):
    plan = routed(logits, config, key=jax.random.key(seed))
    np.testing.assert_array_equal(plan.valid, expected.valid)


def test_random_second_draws_anew_with_each_key_and_alike_with_the_same():
  config = preset("gshard", num_experts=E, overflow="dropless")
  logits = jax.random.normal(KEY, (2, 32, E))
  used = [
    np.asarray(routed(logits, config, key=jax.random.key(seed), train=True).valid)
    for seed in (1, 1, 2)
  ]
  np.testing.assert_array_equal(used[0], used[1])
  assert np.any(used[0] != used[2])
  # The first choice is always used.
  assert np.all(used[0].reshape(2, 32, 2)[..., 0])


def test_bfloat16_activations_are_routed_in_float32():
  x = tokens(jnp.bfloat16)
  y, aux = compiled_layer(False)(x, KEY)
  assert y.dtype == jnp.bfloat16
  assert aux.router_logits.dtype == jnp.float32
  assert aux.plan.weight.dtype == jnp.float32
  assert {value.dtype for value in aux.plan.losses.values()} == {jnp.dtype("float32")}
  _, same = compiled_layer(False)(x.astype(jnp.float32), KEY)
  np.testing.assert_array_equal(aux.router_logits, same.router_logits)
  jax.tree.map(np.testing.assert_array_equal, aux.plan, same.plan)


def test_forms_agree_in_bfloat16():
  outputs = [
    compiled_layer(False, dispatch=form)(tokens(jnp.bfloat16), KEY)[0] for form in Dispatch
  ]
  for y in outputs:
    # Sums are taken in float32 and rounded once: at most one step of bfloat16, 2^-8, apart. So far
    # apart may be the rows of order 1, too, which only forms that store them have to round.
    np.testing.assert_allclose(
      np.asarray(y, np.float32), np.asarray(outputs[0], np.float32), rtol=2**-7, atol=2**-8
    )


def test_dropout_of_experts_is_off_without_training():
  x = tokens()
  dropped, _ = compiled_layer(True, expert_dropout=0.5)(x, KEY)
  clean, _ = compiled_layer(True)(x, KEY)
  evaluated, _ = compiled_layer(False, expert_dropout=0.5)(x, KEY)
  assert not np.allclose(dropped, clean)
  np.testing.assert_allclose(evaluated, clean, rtol=1e-6, atol=1e-6)
