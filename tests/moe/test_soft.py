"""Soft MoE equals the loop over slots; its configs refuse what it cannot do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from moe.compiled import FAST_COMPILE, routed
from oracles import losses, soft_moe

from moe_jax.errors import UserError
from moe_jax.moe import MoEConfig, RoutingConfig, route

TOLERANCE = 1e-5


def config_of(num_experts, capacity, **fields):
  return RoutingConfig(
    num_experts=num_experts,
    selection="soft",
    capacity=capacity,
    **{"balance_loss_weight": 0.0, **fields},
  )


def masks(shape):
  real = np.ones(shape, bool)
  right, group = real.copy(), real.copy()
  right[-1, shape[1] // 2 :], group[-1] = False, False
  return {"none": real, "right": right, "group": group, "all": ~real}


# G, S, E and C: one token, one slot in all, more slots than tokens, and plain ones.
SHAPES = [(2, 1, 3, 2), (1, 5, 1, 1), (2, 3, 2, 5), (2, 7, 4, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixtures_equal_the_two_softmaxes(shape):
  G, S, E, C = shape
  plain = np.random.default_rng(0).normal(size=(G, S, E * C)).astype(np.float32)
  # Beyond float32's exp: both softmaxes must subtract the largest.
  for logits in (plain, 100.0 * plain, np.full_like(plain, 0.3)):
    for mask in masks((G, S)).values():
      plan = routed(logits, config_of(E, C), mask=mask, train=True)
      pairs = [
        soft_moe.mixtures(a, token_mask=m) for a, m in zip(np.float64(logits), mask, strict=True)
      ]
      dispatch, combine = (np.reshape(parts, shape) for parts in zip(*pairs, strict=True))
      assert relative_error(plan.dispatch_mask(), dispatch) <= TOLERANCE
      assert relative_error(plan.combine_weights(), combine) <= TOLERANCE
      z = losses.router_z_loss(logits, token_mask=mask)
      assert relative_error(plan.losses["router_z"], z) <= TOLERANCE


def test_metrics_say_that_every_token_reaches_every_expert():
  logits = np.random.default_rng(1).normal(size=(2, 6, 8)).astype(np.float32)
  plan = routed(logits, config_of(4, 2), mask=masks((2, 6))["right"])
  metrics = {name: float(plan.metrics[name]) for name in plan.metrics if name != "load"}
  assert metrics["experts_per_token"] == pytest.approx(4.0)
  assert metrics["dropped_fraction"] == metrics["dropped_token_fraction"] == 0.0
  assert metrics["unrouted_fraction"] == metrics["dead_experts"] == 0.0
  # A slot is full of mixtures; load is the share of the outputs that comes from each expert.
  assert metrics["capacity_utilization"] == pytest.approx(1.0)
  share = np.sum(plan.combine_weights(), axis=3)
  np.testing.assert_allclose(plan.metrics["load"], share.sum(axis=(0, 1)) / 9, rtol=TOLERANCE)
  assert metrics["router_confidence"] == pytest.approx(share.max(axis=2).sum() / 9)


def test_padding_of_nan_reaches_no_value_and_no_gradient():
  logits = np.random.default_rng(2).normal(size=(2, 6, 8)).astype(np.float32)

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  @jax.value_and_grad
  def total(logits, mask):
    plan = route(logits, config_of(4, 2), token_mask=mask, train=True)
    squares = jnp.sum(plan.combine_weights() ** 2) + jnp.sum(plan.dispatch_mask() ** 2)
    return squares + plan.losses["router_z"]

  for mask in masks((2, 6)).values():
    clean, dirty = total(logits, mask), total(np.where(mask[..., None], logits, np.nan), mask)
    for actual, expected in zip(dirty, clean, strict=True):
      assert np.isfinite(actual).all()
      np.testing.assert_array_equal(actual, expected)
    assert not np.any(np.asarray(dirty[1])[~mask])


@pytest.mark.parametrize("dispatch", ["gather", "ragged"])
def test_only_einsum_dispatch_carries_a_mixture(dispatch):
  message = f"dispatch = {dispatch} cannot carry out selection = soft.* use dispatch = einsum$"
  with pytest.raises(UserError, match=message) as caught:
    MoEConfig(config_of(4, 2), 8, dispatch=dispatch)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(capacity=None), "capacity = None .* number of slots per expert"),
    (dict(score="sigmoid"), "score = sigmoid .* softmax"),
    (dict(weighting="renormalized"), "weighting = renormalized .* raw"),
    (dict(overflow="dropless"), "overflow = dropless .* drop"),
    (dict(weight_on="input"), "weight_on = input .* output"),
    (dict(balance_loss_weight=0.01), "balance_loss_weight = 0.01 .* every slot is used"),
  ],
)
def test_what_a_mixture_has_no_use_for_is_refused(fields, message):
  with pytest.raises(UserError, match=message):
    config_of(4, **{"capacity": 2, **fields})
