"""What holds for every plan, whatever the logits."""

import functools

import jax
import numpy as np
import pytest
from comparison import draw_logits
from moe.compiled import FAST_COMPILE, routed, tensors

from moe_jax.moe import RoutingConfig, route

G, S, E, K, C = 2, 10, 4, 2, 3
SEEDS = range(5)
ORDERS = [
  pytest.param({"drop_order": order, "priority": priority}, id=f"{order}-{priority}")
  for order in ("choice_major", "token_major")
  for priority in ("position", "max_score", "probability")
]
ROUTERS = [
  *ORDERS,
  pytest.param({"overflow": "reroute", "reroute_attempts": 2}, id="reroute"),
  pytest.param({"priority": "sum_score", "score": "sigmoid"}, id="sum_score"),
  pytest.param({"num_expert_groups": 2, "priority": "random"}, id="expert_groups"),
  pytest.param({"selection": "positive", "score": "relu"}, id="positive"),
  pytest.param({"selection": "random"}, id="random"),
]


def config_of(**fields):
  return RoutingConfig(**{"num_experts": E, "top_k": K, "capacity": C, **fields})


def mask_of(seed):
  return np.random.default_rng(seed).random((G, S)) < 0.8


def arrays(plan):
  return tuple(np.asarray(a) for a in tensors(plan))


@pytest.mark.parametrize("order", ROUTERS)
def test_slots_hold_one_token_and_fill_from_the_front(order):
  for seed in SEEDS:
    mask = mask_of(seed)
    plan = routed(draw_logits(seed, (G, S, E)), config_of(**order), mask=mask, train=True)
    dispatch, weights = arrays(plan)
    held = dispatch.sum(axis=1)
    assert held.max() <= 1
    # Slot c + 1 is used only where slot c is.
    assert np.all(np.diff(held, axis=-1) <= 0)
    assert held.sum(axis=-1).max() <= C
    assert not dispatch[~mask].any()
    # A token meets an expert once, and only slots that are held have a weight.
    assert dispatch.sum(axis=-1).max() <= 1
    assert not weights[~dispatch].any()
    assert np.asarray(plan.valid).sum() == dispatch.sum()


@pytest.mark.parametrize("order", ORDERS)
def test_a_token_is_refused_only_by_a_full_expert(order):
  for seed in SEEDS:
    plan = routed(draw_logits(seed, (G, S, E)), config_of(**order))
    dispatch, _ = arrays(plan)
    kept = dispatch.any(axis=(1, 3)) * dispatch.sum(axis=(1, 3))
    group, index = np.nonzero(~np.asarray(plan.valid))
    assert len(group)
    assert np.all(kept[group, np.asarray(plan.expert)[group, index]] == C)


@pytest.mark.parametrize("weighting", ["renormalized", "softmax_selected"])
def test_weights_of_a_token_sum_to_one_when_nothing_is_dropped(weighting):
  for seed in SEEDS:
    config = config_of(weighting=weighting, overflow="dropless", capacity=None)
    _, weights = arrays(routed(draw_logits(seed, (G, S, E)), config))
    np.testing.assert_allclose(weights.sum(axis=(2, 3)), 1.0, atol=1e-6)


def test_weights_after_drop_sum_to_one_or_nothing():
  for seed in SEEDS:
    config = config_of(weighting="renormalized_after_drop")
    dispatch, weights = arrays(routed(draw_logits(seed, (G, S, E)), config))
    served = dispatch.any(axis=(2, 3))
    np.testing.assert_allclose(weights.sum(axis=(2, 3)), served.astype(float), atol=1e-6)


@functools.cache
def small_weight():
  """Returns value and gradient of the only weight of token 1, whose first choice is dropped."""
  config = config_of(capacity=1, weighting="renormalized_after_drop", drop_order="token_major")

  def weight(logits):
    return route(logits, config).combine_weights()[0, 1, 1, 0]

  return jax.jit(jax.value_and_grad(weight), compiler_options=FAST_COMPILE)


@pytest.mark.parametrize("gap", [20.0, 50.0, 80.0])
def test_a_weight_after_drop_is_trainable_however_small_its_score(gap):
  # Both tokens prefer expert 0. The second one is left with expert 1, of probability e^-gap.
  logits = np.array([[[gap, -5.0, 0.0, -6.0], [gap, 0.0, -1.0, -2.0]]], np.float32)
  value, gradient = small_weight()(logits)
  # p / p is constant.
  assert float(value) == pytest.approx(1.0)
  np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_permuting_experts_permutes_the_plan(order):
  permutation = np.array([2, 0, 3, 1])
  for seed in SEEDS:
    logits = draw_logits(seed, (G, S, E))
    dispatch, weights = arrays(routed(logits, config_of(**order)))
    permuted_dispatch, permuted_weights = arrays(
      routed(logits[..., permutation], config_of(**order))
    )
    np.testing.assert_array_equal(permuted_dispatch, dispatch[:, :, permutation])
    np.testing.assert_allclose(permuted_weights, weights[:, :, permutation], atol=1e-6)


def changed_at(logits, token, seed):
  """Returns the logits with another token in one place of every group."""
  changed = logits.copy()
  changed[:, token] = draw_logits(seed + 100, (G, E))
  return changed


def test_token_major_order_is_causal():
  for seed in SEEDS:
    logits = draw_logits(seed, (G, S, E))
    before = arrays(routed(logits, config_of(drop_order="token_major")))
    for token in (0, 4, S - 1):
      changed = changed_at(logits, token, seed)
      after = arrays(routed(changed, config_of(drop_order="token_major")))
      for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[:, :token], b[:, :token])


@pytest.mark.parametrize(
  "fields",
  [
    {"drop_order": "choice_major"},
    {"drop_order": "token_major", "priority": "max_score"},
    {"drop_order": "token_major", "priority": "sum_score", "score": "sigmoid"},
    {"drop_order": "token_major", "priority": "probability"},
  ],
)
def test_choice_major_order_and_priorities_are_not_causal(fields):
  config = config_of(capacity=1, **fields)
  # Token 0 likes experts 1, 0; token 1 is 2, 3 at first and 0, 3, more surely, afterwards.
  logits = np.zeros((1, 2, E), np.float32)
  logits[0, 0] = [1.0, 2.0, 0.0, -1.0]
  logits[0, 1] = [-1.0, -2.0, 5.0, 2.0]
  before, _ = arrays(routed(logits, config))
  logits[0, 1] = [5.0, -2.0, -1.0, 2.0]
  after, _ = arrays(routed(logits, config))
  assert before[0, 0, 0].any() and not after[0, 0, 0].any()
