"""Router losses have their closed forms, their gradients, and nothing of padding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import draw_logits, relative_error
from moe.compiled import FAST_COMPILE, routed
from moe.oracle_view import expected_losses
from oracles import finite_differences, routing

from moe_jax.moe import RoutingConfig, route
from moe_jax.moe.losses import load_balance_loss, router_z_loss

E, K, S = 4, 2, 8
# Float32 means of a few dozen numbers.
TOLERANCE = 1e-5
UNIFORM_COSTS = {"first_choice": 1.0, "all_choices": K, "all_choices_mean": 1.0}
SCOPES = ("group", "batch")
PADDINGS = ("exclude", "flaxformer")


def config_of(**fields):
  return RoutingConfig(num_experts=E, top_k=K, capacity=S, **fields)


def balance(probs, experts, mask=None, **fields):
  mask = jnp.ones(experts.shape[:2], bool) if mask is None else mask
  return float(load_balance_loss(jnp.float32(probs), jnp.array(experts), mask, config_of(**fields)))


def round_robin(num_groups):
  """Returns choices (G, S, K) that give every expert the same load, the first ones too."""
  token = np.arange(S)
  return np.stack([np.stack([token % E, (token + 1) % E], axis=-1)] * num_groups)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("fraction", "expected"), list(UNIFORM_COSTS.items()))
def test_uniform_routing_costs_one_or_k(fraction, expected, scope):
  probs = np.full((2, S, E), 1.0 / E)
  loss = balance(probs, round_robin(2), balance_fraction=fraction, balance_scope=scope)
  assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_one_expert_for_all_costs_the_number_of_experts(scope):
  probs = np.zeros((2, S, E))
  probs[..., 0] = 1.0
  experts = np.zeros((2, S, K), np.int32)
  assert balance(probs, experts, balance_scope=scope) == pytest.approx(E, rel=1e-6)


def test_groups_that_cancel_are_balanced_in_the_batch_alone():
  # Group g sends everything to expert g: E in each group; over the batch f = P = 1/2 for two.
  probs = np.zeros((2, S, E))
  probs[0, :, 0] = probs[1, :, 1] = 1.0
  experts = np.broadcast_to(np.arange(2, dtype=np.int32)[:, None, None], (2, S, K))
  assert balance(probs, experts, balance_scope="group") == pytest.approx(E, rel=1e-6)
  assert balance(probs, experts, balance_scope="batch") == pytest.approx(E / 2, rel=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
def test_flaxformers_padding_shrinks_the_loss_by_the_square_of_the_real_part(scope):
  probs, experts = np.full((1, S, E), 1.0 / E), round_robin(1)
  mask = jnp.arange(S)[None] < S // 2
  fields = {"balance_scope": scope}
  assert balance(probs, experts, mask, loss_padding="exclude", **fields) == pytest.approx(1.0)
  assert balance(probs, experts, mask, loss_padding="flaxformer", **fields) == pytest.approx(0.25)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_group_of_padding_is_left_out_of_the_mean(scope):
  probs, experts = np.full((2, S, E), 1.0 / E), round_robin(2)
  mask = jnp.array([[True], [False]]) & jnp.ones((2, S), bool)
  assert balance(probs, experts, mask, balance_scope=scope) == pytest.approx(1.0)


def test_z_loss_of_zero_logits_is_the_square_of_the_log_of_experts():
  mask = jnp.ones((2, S), bool)
  for padding in PADDINGS:
    z = router_z_loss(jnp.zeros((2, S, E)), mask, padding)
    assert float(z) == pytest.approx(math.log(E) ** 2, rel=1e-6)


def test_f_carries_no_gradient():
  # With f free of the scores, the loss is linear in them: its gradient is E f / S for each token.
  experts = round_robin(1)
  gradient = jax.grad(
    lambda probs: load_balance_loss(probs, experts, jnp.ones((1, S), bool), config_of())
  )(jnp.asarray(draw_logits(0, (1, S, E))))
  np.testing.assert_allclose(gradient, np.full((1, S, E), E * (1 / E) / S), rtol=1e-6)


@functools.cache
def compiled_gradient(config, name):
  """Returns the gradient of one loss of `route` by the logits."""

  def loss(logits, mask):
    return route(logits, config, token_mask=mask).losses[name]

  return jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)


@pytest.mark.parametrize("name", ["load_balance", "router_z"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
  ("fraction", "scope"),
  [("first_choice", "group"), ("all_choices", "batch"), ("all_choices_mean", "group")],
)
def test_gradients_equal_finite_differences(fraction, scope, padding, name):
  config = config_of(balance_fraction=fraction, balance_scope=scope, loss_padding=padding)
  logits = draw_logits(1, (2, 4, E))
  mask = np.array([[True, True, True, False], [False, True, False, True]])

  def loss(logits):
    groups = routing.route(logits, top_k=K, capacity=S, token_mask=mask)
    return expected_losses(logits, groups, config, mask)[name]

  expected = finite_differences.gradient(loss, logits)
  actual = compiled_gradient(config, name)(logits, mask)
  assert relative_error(actual, expected) <= TOLERANCE
  assert not np.any(np.asarray(actual)[~mask])


@pytest.mark.parametrize("drop_order", ["choice_major", "token_major"])
@pytest.mark.parametrize("priority", ["position", "max_score"])
def test_padding_changes_nothing_for_real_tokens(priority, drop_order):
  config = RoutingConfig(
    num_experts=E, top_k=K, capacity=2, drop_order=drop_order, priority=priority
  )
  logits = draw_logits(2, (1, 6, E))
  alone = routed(logits, config)
  real = np.array([[False, True, True, True, False, True, True, True, False]])
  # What stands in padding would win every slot, and overflows when it is squared.
  padded = np.full((1, 9, E), 1e30, np.float32)
  padded[real] = logits[0]
  plan = routed(padded, config, mask=real)
  weights = np.asarray(plan.combine_weights())
  np.testing.assert_array_equal(weights[real], alone.combine_weights()[0])
  assert not np.any(weights[~real])
  static = {"max_violation_floor", "effective_capacity_factor"}
  for name in alone.metrics.keys() - static:
    assert relative_error(plan.metrics[name], alone.metrics[name]) <= 1e-6, name
  for name, value in alone.losses.items():
    assert relative_error(plan.losses[name], value) <= 1e-6, name


def test_what_stands_in_padding_reaches_no_gradient():
  config, mask = config_of(), np.array([[True, True, False, True]])
  logits = draw_logits(3, (1, 4, E))
  for value in (1e30, np.inf, np.nan):
    spoilt = np.where(mask[..., None], logits, np.float32(value))
    for name in ("load_balance", "router_z"):
      gradient = compiled_gradient(config, name)
      np.testing.assert_array_equal(gradient(spoilt, mask), gradient(logits, mask))
