"""bfloat16 activations: the same model to their precision, router and weights in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from tiny_models import forward, random_parameters, random_tokens, run, tiny_config

from moe_jax.moe import RoutingConfig
from moe_jax.moe.router import Router

# bfloat16 rounds by up to 2^-9 = 0.2 %; some 20 roundings in a row through 4 blocks add up to 1 %,
# and the largest of a few hundred logits to a few times that.
TOLERANCE = 0.05

# Every token visits every expert: no rounding can change the choice.
ROUTING = dict(top_k=4, weighting="raw")
SINGLE = tiny_config(routing=ROUTING)
HALF = tiny_config(routing=ROUTING, dtype="bfloat16")
TOKENS = random_tokens(SINGLE, 2, 6)


@pytest.fixture(scope="module")
def half():
  return run(HALF, TOKENS, return_aux=True)


def test_logits_are_float32_and_close_to_those_of_float32_activations(half):
  logits, _ = half
  assert logits.dtype == jnp.float32
  error = relative_error(logits, run(SINGLE, TOKENS))
  # Below: the activations would not have been bfloat16 at all.
  assert 1e-4 < error <= TOLERANCE


def test_what_the_router_returns_is_float32(half):
  _, aux = half
  floats = [a for a in jax.tree.leaves(aux) if jnp.issubdtype(a.dtype, jnp.floating)]
  assert {a.dtype for a in floats} == {jnp.dtype("float32")}
  for plan in aux.plans:
    # A bfloat16 softmax misses 1 by 1e-3.
    sums = jnp.sum(plan.weight.reshape(-1, 4), axis=-1)
    np.testing.assert_allclose(sums, 1.0, rtol=1e-6)


def test_the_router_multiplies_bfloat16_tokens_in_float32():
  router = Router(64, RoutingConfig(num_experts=8), key=jax.random.key(0), scale=1.0)
  x = jax.random.normal(jax.random.key(1), (1, 16, 64)).astype(jnp.bfloat16)
  exact = np.asarray(x, np.float64) @ np.asarray(router.kernel[...], np.float64)
  assert relative_error(router(x)[0], exact) <= 1e-6


def test_parameters_and_gradients_stay_float32():
  graph, params = random_parameters(HALF)

  def objective(params):
    return jnp.mean(jnp.sin(forward(graph, params, jnp.asarray(TOKENS))))

  gradient = jax.jit(jax.grad(objective))(params)
  for leaf in [*jax.tree.leaves(params), *jax.tree.leaves(gradient)]:
    assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
  # Every kind of parameter is reached.
  for path, param in nnx.to_flat_state(gradient):
    assert np.abs(param.get_value()).max() > 0, path
