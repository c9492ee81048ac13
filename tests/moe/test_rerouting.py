"""Re-routing: who asks on, whom they ask, and when they give up."""

import numpy as np
import pytest
from comparison import draw_logits
from moe.compiled import routed

from moe_jax.moe import RoutingConfig

E, S = 4, 8


def config_of(attempts, **fields):
  fields = {"num_experts": E, "top_k": 1, "capacity": 2, "overflow": "reroute", **fields}
  return RoutingConfig(reroute_attempts=attempts, **fields)


# All eight tokens rank the experts 0, 1, 2, 3.
ALIKE = np.broadcast_to(np.float32([3.0, 2.0, 1.0, 0.0]), (1, S, E))


@pytest.mark.parametrize(("attempts", "placed"), [(1, 4), (2, 6), (3, 8), (9, 8)])
def test_every_attempt_fills_the_next_best_expert(attempts, placed):
  plan = routed(ALIKE, config_of(attempts))
  valid = np.asarray(plan.valid[0])
  assert valid[:placed].all() and not valid[placed:].any()
  np.testing.assert_array_equal(np.asarray(plan.expert[0])[valid], np.arange(S)[:placed] // 2)
  np.testing.assert_array_equal(np.asarray(plan.slot[0])[valid], np.arange(S)[:placed] % 2)
  assert float(plan.metrics["dropped_fraction"]) == pytest.approx(1 - placed / S)


def test_a_rerouted_token_has_the_weight_of_the_expert_it_got():
  plan = routed(ALIKE, config_of(3))
  scores = np.exp(ALIKE[0, 0]) / np.exp(ALIKE[0, 0]).sum()
  np.testing.assert_allclose(plan.weight[0], np.repeat(scores, 2), rtol=1e-5)


def test_the_load_counts_what_was_asked_at_first():
  plan = routed(ALIKE, config_of(3, balance_source="selection"))
  np.testing.assert_array_equal(plan.metrics["load"], [1, 0, 0, 0])
  scores = np.exp(ALIKE[0, 0]) / np.exp(ALIKE[0, 0]).sum()
  assert float(plan.losses["load_balance"]) == pytest.approx(E * scores[0], rel=1e-5)
  sent = routed(ALIKE, config_of(3, balance_source="dispatch"))
  assert float(sent.losses["load_balance"]) == pytest.approx(1.0, rel=1e-5)


def test_two_refused_choices_of_a_token_ask_different_experts():
  for seed in range(5):
    config = config_of(3, top_k=2, capacity=4)
    plan = routed(draw_logits(seed, (2, S, E)), config)
    experts, valid = np.reshape(plan.expert, (2, S, 2)), np.reshape(plan.valid, (2, S, 2))
    assert np.all(experts[..., 0] != experts[..., 1])
    held = np.asarray(plan.dispatch_mask())
    assert held.sum(axis=1).max() == 1 and held.sum() == valid.sum()


def test_a_slot_once_given_is_never_taken_away():
  for seed in range(5):
    logits = draw_logits(seed, (1, S, E))
    kept = np.asarray(routed(logits, config_of(1, overflow="drop")).dispatch_mask())
    more = np.asarray(routed(logits, config_of(3)).dispatch_mask())
    assert np.all(more[kept]) and more.sum() >= kept.sum()


def test_a_token_never_asks_outside_its_expert_groups():
  # Groups of two experts; every token may ask group 0 alone, whose four slots fill.
  config = config_of(3, num_expert_groups=2)
  plan = routed(ALIKE, config)
  assert np.asarray(plan.valid).sum() == 4
  assert np.asarray(plan.expert).max() == 1


def test_rerouting_is_not_causal():
  # Token 0 and 1 want expert 0, with one slot; token 2 takes expert 1 before token 1 asks for it.
  logits = np.float32([[[3, 2, 0, 0], [3, 2, 0, -1], [3, 0, 2, 0]]])
  config = config_of(1, capacity=1, drop_order="token_major")
  before = routed(logits, config)
  logits[0, 2] = [0, 3, 0, 0]
  after = routed(logits, config)
  assert bool(before.valid[0, 1]) and not bool(after.valid[0, 1])
