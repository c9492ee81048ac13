"""Router losses have their closed forms and nothing of padding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import draw_logits, relative_error
from moe.compiled import routed

from moe_jax.moe import RoutingConfig
from moe_jax.moe.losses import (
  importance_loss,
  load_balance_loss,
  load_loss,
  load_threshold,
  router_z_loss,
  squared_variation,
)

E, K, S = 4, 2, 8
UNIFORM_COSTS = {"first_choice": 1.0, "all_choices": K, "all_choices_mean": 1.0}
SCOPES = ("group", "sequence", "batch", "global_batch")
PADDINGS = ("exclude", "flaxformer")
# One sequence in each of two groups.
ONE_SEQUENCE = np.zeros((2, S), np.int32)


def config_of(**fields):
  return RoutingConfig(**{"num_experts": E, "top_k": K, "capacity": S, **fields})


def counts(experts, mask, fraction):
  """Returns (G, S, E), 1 where a real token asked for an expert that f counts."""
  experts = experts[..., :1] if fraction == "first_choice" else experts
  return np.eye(E, dtype=np.float32)[experts].sum(axis=2) * mask[..., None]


def balance(probs, experts, mask=None, *, segment_ids=ONE_SEQUENCE, global_load=None, **fields):
  config = config_of(**fields)
  mask = np.ones(experts.shape[:2], bool) if mask is None else np.asarray(mask)
  counted = jnp.asarray(counts(experts, mask, config.balance_fraction))
  segment_ids = jnp.asarray(segment_ids[: len(mask)])
  loss = load_balance_loss(
    jnp.float32(probs),
    counted,
    jnp.asarray(mask),
    config,
    segment_ids=segment_ids,
    global_load=global_load,
  )
  return float(loss)


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


def test_sequences_that_cancel_are_balanced_in_the_group_alone():
  # The first half of the group sends everything to expert 0, the second half to expert 1.
  half = np.arange(S) // (S // 2)
  probs, experts = np.eye(E)[half][None], np.stack([half, half], axis=-1)[None]
  for ids in (half, np.array([3, 3, 3, 3, 0, 0, 0, 0])):
    loss = balance(probs, experts, balance_scope="sequence", segment_ids=ids[None])
    assert loss == pytest.approx(E, rel=1e-6)
  assert balance(probs, experts, balance_scope="group") == pytest.approx(E / 2, rel=1e-6)


def test_microbatches_with_the_load_of_the_step_average_to_its_loss():
  # The two microbatches lean to different experts.
  logits = draw_logits(0, (2, S, E)) + np.array([[[2, 1, 0, 0]], [[0, 0, 1, 2]]], np.float32)
  probs = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
  experts = np.argsort(-probs, axis=-1)[..., :K]
  fields = {"balance_scope": "global_batch", "balance_fraction": "all_choices"}
  whole = balance(probs, experts, **fields)
  load = jnp.asarray(counts(experts, np.ones((2, S)), "all_choices").mean(axis=(0, 1)))
  parts = [
    balance(probs[g : g + 1], experts[g : g + 1], global_load=load, **fields) for g in range(2)
  ]
  assert np.mean(parts) == pytest.approx(whole, rel=1e-6)
  # The load of each microbatch alone costs more: they do not cancel.
  alone = [balance(probs[g : g + 1], experts[g : g + 1], **fields) for g in range(2)]
  assert np.mean(alone) > whole * 1.1


@pytest.mark.parametrize("scope", SCOPES)
def test_flaxformers_padding_shrinks_the_loss_by_the_square_of_the_real_part(scope):
  probs, experts = np.full((1, S, E), 1.0 / E), round_robin(1)
  mask = np.arange(S)[None] < S // 2
  fields = {"balance_scope": scope}
  assert balance(probs, experts, mask, loss_padding="exclude", **fields) == pytest.approx(1.0)
  assert balance(probs, experts, mask, loss_padding="flaxformer", **fields) == pytest.approx(0.25)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_group_of_padding_is_left_out_of_the_mean(scope):
  probs, experts = np.full((2, S, E), 1.0 / E), round_robin(2)
  mask = np.array([[True], [False]]) & np.ones((2, S), bool)
  assert balance(probs, experts, mask, balance_scope=scope) == pytest.approx(1.0)


@pytest.mark.parametrize("fraction", ["first_choice", "all_choices"])
def test_f_of_what_was_dispatched_is_smaller_than_f_of_what_was_asked(fraction):
  logits = draw_logits(0, (1, S, E))
  asked, sent = (
    routed(logits, config_of(capacity=1, balance_fraction=fraction, balance_source=source))
    for source in ("selection", "dispatch")
  )
  probs = np.asarray(jax.nn.softmax(jnp.asarray(logits)))[0]
  kept = np.asarray(sent.dispatch_mask()).any(axis=-1)[0]
  if fraction == "first_choice":
    kept &= np.asarray(jax.nn.one_hot(jnp.argmax(logits[0], axis=-1), E)) > 0
  expected = E * float(np.sum(kept.mean(axis=0) * probs.mean(axis=0)))
  assert float(sent.losses["load_balance"]) == pytest.approx(expected, rel=1e-5)
  assert float(sent.losses["load_balance"]) < 0.5 * float(asked.losses["load_balance"])


def test_sigmoid_scores_are_divided_by_their_sum_in_the_balance_loss():
  # Eight equal tokens: f is 1 for two experts, P is score / sum of scores.
  logits = np.broadcast_to(np.float32([1.0, 0.5, -0.5, -1.0]), (1, S, E))
  plan = routed(logits, config_of(score="sigmoid", balance_fraction="all_choices"))
  score = 1 / (1 + np.exp(-logits[0, 0].astype(np.float64)))
  expected = E * (score[0] + score[1]) / score.sum()
  assert float(plan.losses["load_balance"]) == pytest.approx(expected, rel=1e-5)


def test_a_second_expert_that_lost_its_draw_is_not_counted():
  logits = np.broadcast_to(np.float32([3.0, 0.0, -1.0, -1.0]), (1, S, E))
  # A second expert of share e^-3 against draws up to 1e6.
  config = config_of(
    selection="random_second", second_threshold=1e6, balance_fraction="all_choices"
  )
  plan = routed(logits, config, train=True)
  confidence = np.exp(3.0) / np.sum(np.exp(logits[0, 0].astype(np.float64)))
  assert float(plan.metrics["assignments"]) == S
  assert float(plan.losses["load_balance"]) == pytest.approx(E * confidence, rel=1e-5)


def test_z_loss_of_zero_logits_is_the_square_of_the_log_of_experts():
  mask = jnp.ones((2, S), bool)
  for padding in PADDINGS:
    z = router_z_loss(jnp.zeros((2, S, E)), mask, padding)
    assert float(z) == pytest.approx(math.log(E) ** 2, rel=1e-6)


def test_z_loss_counts_padding_in_flaxformers_convention_alone():
  mask = jnp.asarray(np.arange(S)[None] < S // 2)
  # What stands in padding enters neither convention.
  logits = jnp.broadcast_to(jnp.where(mask, 2.0, 5.0)[..., None], (1, S, E))
  real, pad = (2.0 + math.log(E)) ** 2, math.log(E) ** 2
  assert float(router_z_loss(logits, mask, "exclude")) == pytest.approx(real, rel=1e-6)
  mixed = float(router_z_loss(logits, mask, "flaxformer"))
  assert mixed == pytest.approx((real + pad) / 2, rel=1e-6)


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_importance_is_zero_when_even_and_experts_less_one_when_all_in_one(scope):
  config, mask = config_of(balance_scope=scope), jnp.ones((2, S), bool)
  even = importance_loss(jnp.full((2, S, E), 0.3), mask, config)
  assert float(even) == pytest.approx(0.0, abs=1e-6)
  one = jnp.zeros((2, S, E)).at[..., 1].set(0.7)
  # CV^2 of (x, 0, ..., 0): variance x^2 (1/E - 1/E^2) over mean^2 x^2 / E^2.
  assert float(importance_loss(one, mask, config)) == pytest.approx(E - 1, rel=1e-6)
  assert float(importance_loss(jnp.zeros((2, S, E)), mask, config)) == 0.0


@pytest.mark.parametrize("padding", PADDINGS)
def test_a_group_of_padding_pulls_importance_and_load_down_in_flaxformers_convention_alone(padding):
  fields = {"noise": "learned", "load_loss_weight": 0.1, "loss_padding": padding}
  logits, mask = draw_logits(0, (3, S, E)), np.ones((3, S), bool)
  mask[1:] = False
  # Noise of a group does not depend on the number of groups if there is next to none.
  scale = np.full((3, S, E), 1e-3, np.float32)
  alone = routed(logits[:1], config_of(**fields), noise_scale=scale[:1], train=True)
  padded = routed(logits, config_of(**fields), mask=mask, noise_scale=scale, train=True)
  groups = 3 if padding == "flaxformer" else 1
  for name, tolerance in (("importance", 1e-6), ("load", 1e-3)):
    expected = float(alone.losses[name]) / groups
    assert expected > 0 and float(padded.losses[name]) == pytest.approx(expected, rel=tolerance)


def test_the_variance_is_that_of_the_population():
  # mean 2, variance ((1)^2 + (1)^2) / 2 = 1, not 2 / 1 = 2.
  assert float(squared_variation(jnp.array([1.0, 3.0]))) == pytest.approx(0.25)


def test_importance_of_scores_is_taken_without_noise():
  logits = draw_logits(0, (1, S, E))
  fields = {"noise": "gaussian", "noise_std": 3.0}
  clean = routed(logits, config_of())
  noisy = routed(logits, config_of(**fields), train=True)
  for name in ("importance", "router_z"):
    assert relative_error(noisy.losses[name], clean.losses[name]) <= 1e-6, name
  weights = routed(logits, config_of(importance="weights", **fields), train=True)
  assert relative_error(weights.losses["importance"], clean.losses["importance"]) > 1e-2


def test_load_thresholds_of_both_kinds_by_hand():
  noisy = jnp.array([[[4.0, 1.0, 3.0, 2.0]]])
  exclude = load_threshold(noisy, config_of(load_threshold="exclude_self"))
  # K = 2: without itself, 4 and 3 have 2 for the second largest, the others have 3.
  np.testing.assert_array_equal(exclude[0, 0], [2.0, 3.0, 2.0, 3.0])
  include = load_threshold(noisy, config_of(load_threshold="include_self"))
  np.testing.assert_array_equal(include[0, 0], [3.0, 3.0, 3.0, 3.0])


def test_the_load_of_two_experts_by_hand():
  # K = 1: P(e) = Phi((logit_e - the other's noisy logit) / std): Phi(1) and Phi(-1/2).
  logits, noisy = jnp.array([[[2.0, 0.5]]]), jnp.array([[[1.5, 0.0]]])
  config = RoutingConfig(num_experts=2, top_k=1)
  loss = load_loss(logits, noisy, jnp.full((1, 1, 2), 2.0), jnp.ones((1, 1), bool), config)
  load = np.array([0.8413447, 0.3085375])
  assert float(loss) == pytest.approx(load.var() / load.mean() ** 2, rel=1e-5)


@pytest.mark.parametrize("drop_order", ["choice_major", "token_major"])
@pytest.mark.parametrize("priority", ["position", "max_score", "sum_score", "probability"])
def test_padding_changes_nothing_for_real_tokens(priority, drop_order):
  config = RoutingConfig(
    num_experts=E, top_k=K, capacity=2, drop_order=drop_order, priority=priority
  )
  # Scores that are told apart by their sums too.
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
