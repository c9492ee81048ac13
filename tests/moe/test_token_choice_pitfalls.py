"""Mistakes that routers of tokens are known for: each test fails on the wrong behaviour."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import draw_logits
from moe.compiled import routed

from moe_jax.moe import RoutingConfig, route

E, K, S = 6, 2, 12
GROUPS = {"num_expert_groups": 3, "top_expert_groups": 2}


def config_of(**fields):
  return RoutingConfig(**{"num_experts": E, "top_k": K, "overflow": "dropless", **fields})


def experts_of(plan):
  return np.asarray(plan.expert).reshape(-1, K)


def sigmoid(logits):
  return 1 / (1 + np.exp(-np.float64(logits)))


def test_renormalised_softmax_scores_equal_the_softmax_of_the_selected_logits():
  logits = draw_logits(0, (1, S, E))
  one = routed(logits, config_of(weighting="renormalized"))
  other = routed(logits, config_of(weighting="softmax_selected"))
  np.testing.assert_allclose(one.weight, other.weight, rtol=1e-5)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
def test_renormalised_weights_have_the_norm_of_their_order_times_the_scale(order):
  config = config_of(
    score="sigmoid", weighting="renormalized", weight_norm_order=order, weight_scale=2.5
  )
  weight = np.float64(routed(draw_logits(0, (1, S, E)), config).weight).reshape(-1, K)
  np.testing.assert_allclose((weight**order).sum(-1) ** (1 / order), 2.5, rtol=1e-5)


def test_norms_before_and_after_drops_differ_by_what_was_dropped():
  logits = np.broadcast_to(np.float32([2.0, 1.0, -9, -9, -9, -9]), (1, 2, E))
  fields = {"overflow": "drop", "capacity": 1, "drop_order": "token_major"}
  before = routed(logits, config_of(weighting="renormalized", **fields))
  after = routed(logits, config_of(weighting="renormalized_after_drop", **fields))
  share = 1 / (1 + np.exp(-1.0))
  np.testing.assert_allclose(before.weight[0], [share, 1 - share, 0, 0], rtol=1e-4)
  np.testing.assert_array_equal(after.valid, before.valid)
  # The second token lost both; the first one's norm is over what it kept.
  np.testing.assert_allclose(after.weight[0], [share, 1 - share, 0, 0], rtol=1e-4)
  fields["drop_order"] = "choice_major"
  logits = np.float32([[[2.0, 1.0, -9, -9, -9, -9], [-9, 2.0, 1.0, -9, -9, -9]]])
  before = routed(logits, config_of(weighting="renormalized", **fields))
  after = routed(logits, config_of(weighting="renormalized_after_drop", **fields))
  np.testing.assert_allclose(before.weight[0], [share, 0, share, 1 - share], rtol=1e-4)
  np.testing.assert_allclose(after.weight[0], [1, 0, share, 1 - share], rtol=1e-4)


@pytest.mark.parametrize("priority", ["position", "max_score", "sum_score", "probability"])
def test_equal_tokens_are_served_left_to_right(priority):
  logits = np.broadcast_to(np.float32([2.0, 1.0, -9, -9, -9, -9]), (1, 64, E))
  config = config_of(overflow="drop", capacity=5, priority=priority)
  valid = np.asarray(routed(logits, config).valid).reshape(64, K)
  assert valid[:5].all() and not valid[5:].any()


def test_equal_scores_go_to_the_lower_expert():
  plan = routed(np.zeros((1, S, E), np.float32), config_of())
  np.testing.assert_array_equal(experts_of(plan), [[0, 1]] * S)


def test_a_bias_chooses_but_does_not_weigh():
  logits = draw_logits(0, (1, S, E))
  bias = np.float32([0, 0, 0, 5.0, 0, 0])
  config = config_of(score="sigmoid", bias_update="sign", balance_fraction="all_choices")
  plan, plain = routed(logits, config, bias=bias), routed(logits, config)
  assert np.all(experts_of(plan)[:, 0] == 3)
  expected = np.take_along_axis(sigmoid(logits[0]), experts_of(plan), axis=-1)
  np.testing.assert_allclose(np.reshape(plan.weight, (S, K)), expected, rtol=1e-5)
  # P of the balance loss knows no bias either: with the same f it would be the same loss.
  probs = sigmoid(logits[0]) / sigmoid(logits[0]).sum(-1, keepdims=True)
  f = np.bincount(experts_of(plan).ravel(), minlength=E) / S
  assert float(plan.losses["load_balance"]) == pytest.approx(E * f @ probs.mean(0), rel=1e-5)
  assert float(plan.metrics["router_confidence"]) == float(plain.metrics["router_confidence"])


def test_a_bias_gets_no_gradient():
  config = config_of(score="sigmoid", bias_update="sign", weighting="renormalized")
  logits = jnp.asarray(draw_logits(0, (1, S, E)))

  def total(bias):
    plan = route(logits, config, bias=bias)
    return jnp.sum(plan.weight * jnp.arange(2.0 * S)[None]) + sum(plan.losses.values())

  assert not np.any(jax.jit(jax.grad(total))(jnp.linspace(-0.3, 0.3, E)))


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_no_bias_however_negative_lets_a_token_leave_its_groups(group_score):
  # An expert outside that counted as 0 would win against scores of 1 - 5.
  config = config_of(score="sigmoid", bias_update="sign", group_score=group_score, **GROUPS)
  logits = draw_logits(0, (1, 64, E))
  bias = np.full((E,), -5.0, np.float32)
  inside = routed(logits, config)
  plan = routed(logits, config, bias=bias)
  np.testing.assert_array_equal(plan.expert, inside.expert)


def test_groups_are_chosen_by_biased_scores():
  logits = np.zeros((1, S, E), np.float32)
  config = config_of(score="sigmoid", bias_update="sign", **GROUPS | {"top_expert_groups": 1})
  plan = routed(logits, config, bias=np.float32([0, 0, 0, 0, 0, 0.1]))
  np.testing.assert_array_equal(experts_of(plan), [[5, 4]] * S)


def test_groups_by_their_best_expert_differ_from_groups_by_their_two_best():
  # Group 0 has the best expert, group 1 the better pair.
  logits = np.broadcast_to(np.float32([3.0, -3, 2.0, 2.5, -1, -1]), (1, S, E))
  fields = {"score": "sigmoid"} | GROUPS | {"top_expert_groups": 1}
  by_best = routed(logits, config_of(group_score="max", **fields))
  by_pair = routed(logits, config_of(group_score="top2_sum", **fields))
  np.testing.assert_array_equal(experts_of(by_best), [[0, 1]] * S)
  np.testing.assert_array_equal(experts_of(by_pair), [[3, 2]] * S)


def test_slots_are_counted_exactly_beyond_what_bfloat16_can():
  # A bfloat16 running sum stops at 256.
  logits = np.zeros((1, 700, E), np.float32)
  plan = routed(logits, config_of())
  np.testing.assert_array_equal(np.reshape(plan.slot, (700, K))[:, 0], np.arange(700))


def test_bfloat16_logits_are_scored_in_float32():
  logits = jnp.asarray(draw_logits(0, (1, 64, E))).astype(jnp.bfloat16)
  plan = routed(logits, config_of())
  exact = routed(logits.astype(jnp.float32), config_of())
  assert plan.weight.dtype == jnp.float32
  jax.tree.map(np.testing.assert_array_equal, plan, exact)


def test_an_expert_of_weight_zero_is_still_visited_and_counted():
  # ReLU scores of the second choice are 0, and a softmax score e^-200 is 0 in float32.
  relu = np.broadcast_to(np.float32([2.0, -1.0, -2, -3, -4, -5]), (1, S, E))
  softmax = np.broadcast_to(np.float32([200.0, 0, -9, -9, -9, -9]), (1, S, E))
  for logits, score in ((relu, "relu"), (softmax, "softmax")):
    plan = routed(logits, config_of(score=score))
    assert np.all(plan.valid)
    weight = np.reshape(plan.weight, (S, K))
    assert np.all(weight[:, 0] > 0) and not np.any(weight[:, 1])
    assert np.asarray(plan.dispatch_mask()).sum() == S * K
    np.testing.assert_allclose(plan.metrics["load"][:2], 0.5)


def test_a_token_is_lost_only_when_all_its_experts_are_full():
  # Two tokens that want experts 0 and 1, one slot each: one token is lost, half of four wishes.
  logits = np.broadcast_to(np.float32([2.0, 1.0, -9, -9, -9, -9]), (1, 2, E))
  metrics = routed(logits, config_of(overflow="drop", capacity=1)).metrics
  assert float(metrics["dropped_fraction"]) == pytest.approx(0.5)
  assert float(metrics["dropped_token_fraction"]) == pytest.approx(0.5)
  # Each keeps its first choice where these differ: none is lost, the half of the wishes still is.
  logits = np.float32([[[2.0, 1.0, -9, -9, -9, -9], [1.0, 2.0, -9, -9, -9, -9]]])
  metrics = routed(logits, config_of(overflow="drop", capacity=1)).metrics
  assert float(metrics["dropped_fraction"]) == pytest.approx(0.5)
  assert float(metrics["dropped_token_fraction"]) == 0.0


@pytest.mark.parametrize("real", [True, False])
def test_metrics_and_losses_are_finite_when_nothing_is_routed(real):
  config = config_of(selection="positive", score="relu", importance="weights")
  plan = routed(np.full((1, S, E), -1.0, np.float32), config, mask=np.full((1, S), real))
  assert not np.any(plan.valid)
  for name, value in (plan.metrics | plan.losses).items():
    assert np.all(np.isfinite(value)), name
  assert float(plan.metrics["unrouted_fraction"]) == float(real)
  assert float(plan.metrics["dropped_token_fraction"]) == 0.0


def test_without_drops_a_token_does_not_depend_on_its_neighbours():
  logits = draw_logits(0, (1, S, E))
  whole = np.reshape(routed(logits, config_of()).weight, (S, K))
  parts = [routed(logits[:, at : at + 4], config_of()).weight for at in range(0, S, 4)]
  np.testing.assert_array_equal(whole, np.reshape(parts, (S, K)))


def test_weights_of_groups_do_not_depend_on_other_groups():
  logits = draw_logits(0, (3, S, E))
  config = config_of(overflow="drop", capacity=3)
  together = routed(logits, config)
  for group in range(3):
    alone = routed(logits[group : group + 1], config)
    for name in ("expert", "slot", "valid", "weight"):
      np.testing.assert_array_equal(getattr(together, name)[group], getattr(alone, name)[0])


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus", "relu"])
@pytest.mark.parametrize("weighting", ["raw", "renormalized", "renormalized_after_drop"])
def test_gradients_of_extreme_logits_are_finite(weighting, score):
  config = config_of(score=score, weighting=weighting, weight_norm_order=2.0)
  logits = np.zeros((1, 4, E), np.float32)
  logits[0, 0], logits[0, 1] = -200.0, 200.0
  logits[0, 2, 1:], logits[0, 3, :3] = -300.0, 90.0

  def total(logits):
    plan = route(logits, config)
    return jnp.sum(plan.weight * jnp.arange(8.0)[None]) + sum(plan.losses.values())

  value, gradient = jax.jit(jax.value_and_grad(total))(logits)
  assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
  ("priority", "winner"), [("position", 0), ("probability", 0), ("weight", 1)]
)
def test_the_weight_after_normalisation_is_another_order_than_the_probability(priority, winner):
  # Both ask experts 0 and 1. Expert 0 has probability 0.50 and 0.28, weight 0.502 and 0.525.
  logits = np.float32([[[3.0, 2.99, -9, -9, -9, -9], [2.0, 1.9, 1.8, 1.8, -9, -9]]])
  config = config_of(weighting="softmax_selected", overflow="drop", capacity=1, priority=priority)
  dispatched = np.asarray(routed(logits, config).dispatch_mask())[0, :, :, 0]
  assert dispatched[winner, 0] and not dispatched[1 - winner, 0]
  # Expert 1 keeps the first token by every order.
  assert dispatched[0, 1] and not dispatched[1, 1]
