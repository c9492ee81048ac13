"""Gradients of the router losses equal finite differences of the oracle, and padding has none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import ROUTING_MARGIN, draw_logits, relative_error
from moe.compiled import FAST_COMPILE
from moe.oracle_view import expect
from oracles import finite_differences

from moe_jax.moe import RoutingConfig, route
from moe_jax.moe.losses import load_balance_loss

E, K, S = 4, 2, 4
KEY = jax.random.key(1)
# Float32 means of a few dozen numbers.
TOLERANCE = 1e-5
MASK = np.array([[True, True, True, False], [False, True, False, True]])
MORE = {"segment_ids": np.array([[0, 0, 1, 1], [2, 2, 3, 3]], np.int32)}


def config_of(**fields):
  return RoutingConfig(**{"num_experts": E, "top_k": K, "capacity": S, **fields})


def test_f_carries_no_gradient():
  # With f free of the scores, the loss is linear in them: its gradient is E f / S for each token.
  counted = jnp.tile(jnp.eye(E), (1, S // E, 1))
  gradient = jax.grad(
    lambda probs: load_balance_loss(probs, counted, jnp.ones((1, S), bool), config_of())
  )(jnp.asarray(draw_logits(0, (1, S, E))))
  np.testing.assert_allclose(gradient, np.full((1, S, E), E * (1 / E) / S), rtol=1e-6)


def test_the_load_of_the_step_carries_no_gradient():
  config = config_of(balance_scope="global_batch")

  def loss(load):
    logits = jnp.asarray(draw_logits(0, (1, S, E)))
    return route(logits, config, global_load=load).losses["load_balance"]

  assert not np.any(jax.grad(loss)(jnp.full((E,), 0.25)))


@functools.cache
def compiled_gradients(config):
  """Returns the gradients of every loss of `route` by logits and noise scale, by name."""
  train = config.noise != "none"

  def losses(logits, noise_scale, mask):
    more = MORE | ({"noise_scale": noise_scale} if config.noise == "learned" else {})
    return route(logits, config, token_mask=mask, key=KEY, train=train, **more).losses

  return jax.jit(jax.jacrev(losses, argnums=(0, 1)), compiler_options=FAST_COMPILE)


def expected_gradients(config, logits, noise_scale):
  """Returns central differences of the oracle's losses; its noise is what the key draws."""
  names = []

  def losses(logits, noise_scale):
    call = dict(mask=MASK, key=KEY, train=config.noise != "none", noise_scale=noise_scale)
    result = expect(logits, config, **call, **MORE)
    assert result.margin > ROUTING_MARGIN
    names[:] = list(result.losses)
    return np.array(list(result.losses.values()))

  by_logits = finite_differences.gradient(lambda value: losses(value, noise_scale), logits)
  by_scale = np.zeros(by_logits.shape)
  if config.noise == "learned":
    by_scale = finite_differences.gradient(lambda value: losses(logits, value), noise_scale)
  pairs = zip(np.moveaxis(by_logits, -1, 0), np.moveaxis(by_scale, -1, 0), strict=True)
  return dict(zip(names, pairs, strict=True))


# Two devices of two experts; a token may ask both of them.
OVER_DEVICES = {
  "num_expert_groups": 2,
  "top_expert_groups": 2,
  "device_loss_weight": 0.05,
  "communication_loss_weight": 0.02,
}
CASES = {
  "switch": {},
  "batch": {"balance_fraction": "all_choices", "balance_scope": "batch", "score": "sigmoid"},
  "sequence": {"balance_fraction": "all_choices_mean", "balance_scope": "sequence"},
  "dispatch": {"balance_source": "dispatch", "capacity": 1, "score": "relu"},
  "flaxformer": {"loss_padding": "flaxformer", "balance_scope": "sequence"},
  "flaxformer_group": {"loss_padding": "flaxformer", "score": "sqrt_softplus"},
  "weights": {"importance": "weights", "weighting": "renormalized"},
  "segment": {"granularity": "segment", "score": "sigmoid"},
  "gaussian": {"noise": "gaussian", "noise_std": 0.7, "load_loss_weight": 0.1},
  "learned": {"noise": "learned", "load_loss_weight": 0.1, "balance_scope": "batch"},
  "include_self": {
    "noise": "learned",
    "load_loss_weight": 0.1,
    "load_threshold": "include_self",
    "importance": "weights",
  },
  "devices": {
    **OVER_DEVICES,
    "balance_fraction": "all_choices_mean",
    "balance_scope": "sequence",
    "weighting": "renormalized",
  },
  "devices_dispatch": {
    **OVER_DEVICES,
    "balance_source": "dispatch",
    "balance_fraction": "all_choices",
    "balance_scope": "batch",
    # Where every expert is full all devices get alike, and the gradient vanishes.
    "capacity": 2,
    "score": "sigmoid",
    "loss_padding": "flaxformer",
  },
  "all_experts": {"noise": "learned", "load_loss_weight": 0.1, "top_k": E},
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_finite_differences(name):
  config = config_of(**CASES[name])
  logits = draw_logits(1, (2, S, E))
  noise_scale = np.random.default_rng(2).uniform(0.4, 1.1, size=logits.shape).astype(np.float32)
  actual = compiled_gradients(config)(logits, noise_scale, MASK)
  expected = expected_gradients(config, logits, noise_scale)
  assert actual.keys() == expected.keys()
  for loss, gradients in actual.items():
    for own, right in zip(gradients, expected[loss], strict=True):
      # Central differences themselves are good to 1e-9 or so.
      assert relative_error(own, np.where(np.abs(right) < 1e-8, 0, right)) <= TOLERANCE, loss
      assert not np.any(np.asarray(own)[~MASK]), loss


@pytest.mark.parametrize("fields", [{}, CASES["learned"], CASES["segment"]])
def test_what_stands_in_padding_reaches_no_loss_and_no_gradient(fields):
  config = config_of(**fields)
  gradients = compiled_gradients(config)
  logits, noise_scale = draw_logits(3, (2, S, E)), np.full((2, S, E), 0.7, np.float32)
  clean = gradients(logits, noise_scale, MASK)
  for value in (1e30, np.inf, np.nan):
    spoilt = (np.where(MASK[..., None], a, np.float32(value)) for a in (logits, noise_scale))
    jax.tree.map(np.testing.assert_array_equal, gradients(*spoilt, MASK), clean)
