"""What each selection promises: who is asked, how often, and what the choice depends on."""

import functools

import jax
import numpy as np
import pytest
from comparison import draw_logits
from moe.compiled import routed

from moe_jax.moe import RoutingConfig

E, K = 6, 3
KEY = jax.random.key(0)
LIMITED = {"num_expert_groups": 3, "top_expert_groups": 2}


def config_of(**fields):
  return RoutingConfig(**{"num_experts": E, "top_k": K, "overflow": "dropless", **fields})


def experts_of(plan):
  """Returns (G, S, K) the experts asked for."""
  G, N = plan.expert.shape
  return np.asarray(plan.expert).reshape(G, plan.num_tokens, N // plan.num_tokens)


def frequencies(experts, num_experts=E):
  return np.bincount(np.ravel(experts), minlength=num_experts) / np.size(experts)


@pytest.mark.parametrize("selection", ["random", "sample"])
def test_drawn_experts_never_repeat_within_a_token(selection):
  logits = np.broadcast_to(np.float32([5.0, 0, 0, 0, 0, 0]), (1, 500, E))
  plan = routed(logits, config_of(selection=selection), key=KEY, train=True)
  experts = np.sort(experts_of(plan), axis=-1)
  assert np.all(np.diff(experts, axis=-1) > 0)


def test_random_experts_are_uniform_and_weighted_by_their_own_scores():
  logits = np.broadcast_to(np.float32([3.0, 1, 0, 0, -1, -2]), (1, 2000, E))
  plan = routed(logits, config_of(selection="random", top_k=1), key=KEY, train=True)
  # The standard deviation of a frequency is sqrt(1/6 * 5/6 / 2000) = 0.0083.
  assert np.max(np.abs(frequencies(plan.expert) - 1 / E)) < 5 * 0.0083
  scores = np.exp(logits[0, 0]) / np.exp(logits[0, 0]).sum()
  np.testing.assert_allclose(plan.weight[0], scores[np.asarray(plan.expert[0])], rtol=1e-5)


def test_samples_are_drawn_in_proportion_to_the_scores():
  logits = np.broadcast_to(np.float32([2.0, 1, 0, 0, -1, -2]), (1, 4000, E))
  plan = routed(logits, config_of(selection="sample"), key=KEY, train=True)
  scores = np.exp(logits[0, 0]) / np.exp(logits[0, 0]).sum()
  first = frequencies(experts_of(plan)[..., 0])
  error = np.abs(first - scores) / np.sqrt(scores * (1 - scores) / 4000)
  assert np.max(error) < 5
  # The second, given that expert 0 came first, in proportion to what is left.
  second = frequencies(experts_of(plan)[experts_of(plan)[..., 0] == 0][:, 1])
  np.testing.assert_allclose(second[1:], scores[1:] / scores[1:].sum(), atol=0.05)


@pytest.mark.parametrize(
  "fields",
  [
    {"noise": "gaussian"},
    {"noise": "learned"},
    {"noise": "gumbel"},
    {"selection": "random_second", "top_k": 2},
    {"selection": "sample"},
    {"selection": "random"},
    {"priority": "random", "overflow": "drop", "capacity": 2},
  ],
)
def test_nothing_is_random_outside_training(fields):
  config = config_of(**fields)
  logits = draw_logits(0, (2, 8, E))
  plans = [routed(logits, config, key=jax.random.key(seed)) for seed in (1, 2)]
  jax.tree.map(np.testing.assert_array_equal, *plans)
  more = {"noise_scale": np.ones_like(logits)} if config.noise == "learned" else {}
  keys = (jax.random.key(1), jax.random.key(2))
  drawn = [routed(logits, config, key=key, train=True, **more).valid for key in keys]
  trained = [experts_of(routed(logits, config, key=key, train=True, **more)) for key in keys] + [
    np.asarray(valid) for valid in drawn
  ]
  assert np.any(trained[0] != trained[1]) or np.any(trained[2] != trained[3])


@pytest.mark.parametrize("fields", [{"noise": "gaussian"}, {"noise": "gumbel"}])
def test_outside_training_noise_leaves_the_clean_choice(fields):
  logits = draw_logits(0, (2, 8, E))
  clean, calm = routed(logits, config_of()), routed(logits, config_of(**fields))
  np.testing.assert_array_equal(calm.expert, clean.expert)
  np.testing.assert_array_equal(calm.weight, clean.weight)


def test_random_routing_outside_training_depends_on_the_position_alone():
  config = config_of(selection="random")
  plan = routed(draw_logits(0, (3, 8, E)), config)
  experts = experts_of(plan)
  assert np.all(experts == experts[:1])
  shorter = experts_of(routed(draw_logits(1, (1, 5, E)), config))
  np.testing.assert_array_equal(shorter[0], experts[0, :5])
  assert len({tuple(row) for row in experts[0]}) > 1


def hashed(ids, **fields):
  config = config_of(**{"selection": "hash", "top_k": 1, **fields})
  ids = np.asarray(ids, np.int32)
  return experts_of(routed(np.zeros((*ids.shape, E), np.float32), config, token_ids=ids))


def test_a_hash_depends_on_the_token_alone_and_spreads_the_vocabulary():
  ids = np.arange(3000, dtype=np.int32)[None]
  experts = hashed(ids)
  np.testing.assert_array_equal(hashed(ids[:, ::-1])[:, ::-1], experts)
  assert np.max(np.abs(frequencies(experts) - 1 / E)) < 5 * np.sqrt(1 / E * 5 / E / 3000)
  assert np.mean(hashed(ids, hash_seed=1) == experts) < 0.3


def test_a_hash_of_two_tokens_reads_the_token_before():
  ids = np.random.default_rng(0).integers(0, 1000, size=(1, 400)).astype(np.int32)
  changed = ids.copy()
  changed[:, 0::2] += 1
  before, after = hashed(ids, hash_ngram=2), hashed(changed, hash_ngram=2)
  # Odd positions keep their own id; the token before them is another one.
  assert np.mean(before[:, 1::2] != after[:, 1::2]) > 0.7
  np.testing.assert_array_equal(hashed(ids)[:, 1::2], hashed(changed)[:, 1::2])
  # Before the start stands the id 0.
  np.testing.assert_array_equal(hashed([[7]], hash_ngram=2), hashed([[0, 7]], hash_ngram=2)[:, 1:])


def test_a_hash_of_several_tokens_stops_where_its_sequence_does():
  ids = np.random.default_rng(0).integers(1, 1000, size=(1, 60)).astype(np.int32)
  # The third document of the row has the id of the first again.
  segments = np.repeat([[4, 7, 4]], 20, axis=1)
  config = config_of(selection="hash", top_k=1, hash_ngram=3)
  logits = np.zeros((1, 60, E), np.float32)
  packed = experts_of(routed(logits, config, token_ids=ids, segment_ids=segments))
  alone = hashed(ids.reshape(3, 20), hash_ngram=3)
  np.testing.assert_array_equal(packed.reshape(alone.shape), alone)
  assert np.any(hashed(ids, hash_ngram=3) != packed)


def test_a_hash_of_several_tokens_does_not_read_padding():
  ids = np.array([[8, 9, 5, 6, 7]], np.int32)
  mask = np.array([[False, False, True, True, True]])
  config = config_of(selection="hash", top_k=1, hash_ngram=3)
  padded = experts_of(routed(np.zeros((1, 5, E), np.float32), config, mask=mask, token_ids=ids))
  np.testing.assert_array_equal(padded[:, 2:], hashed(ids[:, 2:], hash_ngram=3))


def test_a_table_names_the_experts_themselves():
  ids = np.array([[0, 5, 3, 7]], np.int32)
  config = config_of(selection="table", top_k=2)
  plan = routed(draw_logits(0, (1, 4, E)), config, token_ids=ids)
  np.testing.assert_array_equal(experts_of(plan)[0], [[0, 1], [5, 0], [3, 4], [1, 2]])


def test_positive_asks_exactly_the_experts_above_zero():
  logits = draw_logits(0, (2, 8, E))
  plan = routed(logits, config_of(selection="positive", score="relu"))
  asked = np.asarray(plan.dispatch_mask()).any(axis=-1)
  np.testing.assert_array_equal(asked, logits > 0)
  assert float(plan.metrics["experts_per_token"]) == pytest.approx((logits > 0).mean() * E)


def test_threshold_second_asks_the_second_by_its_share_with_and_without_training():
  # Shares of the second of two: 1 / (1 + e) = 0.269 and 1 / (1 + e^0.2) = 0.450.
  logits = np.float32([[[2.0, 1.0, -9, -9, -9, -9], [2.0, 1.8, -9, -9, -9, -9]]])
  config = config_of(selection="threshold_second", top_k=2, second_threshold=0.4)
  for train in (False, True):
    plan = routed(logits, config, train=train)
    np.testing.assert_array_equal(plan.valid[0], [True, False, True, True])


def test_random_second_is_asked_as_often_as_its_share_says():
  # A share of 0.269 against a threshold of 0.5: probability 0.538.
  logits = np.broadcast_to(np.float32([2.0, 1.0, -9, -9, -9, -9]), (1, 2000, E))
  config = config_of(selection="random_second", top_k=2)
  plan = routed(logits, config, key=KEY, train=True)
  used = np.asarray(plan.valid).reshape(-1, 2)
  assert used[:, 0].all()
  # Standard deviation sqrt(0.538 * 0.462 / 2000) = 0.011.
  assert abs(used[:, 1].mean() - 0.538) < 5 * 0.011


def test_tokens_of_a_segment_share_their_experts_and_padding_has_no_vote():
  logits = draw_logits(0, (1, 8, E))
  ids = np.array([[1, 1, 1, 2, 2, 2, 2, 1]], np.int32)
  mask = np.array([[True, True, False, True, True, True, False, True]])
  config = config_of(granularity="segment")
  plan = routed(logits, config, mask=mask, segment_ids=ids)
  experts = experts_of(plan)[0]
  means = [logits[0, :2].mean(0), logits[0, 3:6].mean(0), logits[0, 7]]
  for token, mean in zip((0, 1, 3, 4, 5, 7), [means[i] for i in (0, 0, 1, 1, 1, 2)], strict=True):
    assert set(experts[token]) == set(np.argsort(-mean)[:K])


def test_two_levels_take_the_best_experts_of_the_best_gates():
  config = config_of(selection="hierarchical", top_k=2, **LIMITED)
  # Gate 2 is best, then gate 0; inside them experts 5 and 0. Expert 2 has the largest logit of all.
  logits = np.float32([[[1.0, 0.0, 9.0, 8.0, 2.0, 3.0, 1.0, 0.5, 2.0]]])
  plan = routed(logits, config)
  np.testing.assert_array_equal(experts_of(plan)[0, 0], [5, 0])
  gate = np.exp([1.0, 0.5, 2.0]) / np.exp([1.0, 0.5, 2.0]).sum()
  inner = 1 / (1 + np.exp(-1.0))
  np.testing.assert_allclose(plan.weight[0], [gate[2] * inner, gate[0] * inner], rtol=1e-5)


@functools.cache
def null_plan():
  """Returns the plan of tokens that prefer null experts, expert 0, and a null expert of two."""
  logits = np.full((1, 4, 8), -5.0, np.float32)
  logits[0, :2, 6:] = [3.0, 2.0]
  logits[0, 2, [0, 1]] = [3.0, 2.0]
  logits[0, 3, [7, 0]] = [3.0, 2.0]
  config = RoutingConfig(
    num_experts=6,
    top_k=2,
    num_null_experts=2,
    null_expert="identity",
    capacity=1,
    weighting="renormalized",
  )
  return routed(logits, config)


def test_null_experts_take_no_slot_and_weigh_the_token_itself():
  plan = null_plan()
  assert np.asarray(plan.dispatch_mask()).sum() == 2
  share = 1 / (1 + np.exp(-1.0))
  np.testing.assert_allclose(plan.identity[0], [1.0, 1.0, 0.0, share], rtol=1e-5, atol=1e-6)
  assert not np.any(np.asarray(plan.weight)[np.asarray(plan.expert) >= 6])


def test_null_experts_are_no_load_no_drop_and_no_expert_of_a_token():
  metrics = null_plan().metrics
  # Token 2 asks experts 0 and 1, token 3 expert 0, which is full.
  np.testing.assert_allclose(metrics["load"], np.array([2, 1, 0, 0, 0, 0]) / 3, rtol=1e-6)
  assert float(metrics["assignments"]) == 3
  assert float(metrics["dropped_fraction"]) == pytest.approx(1 / 3)
  assert float(metrics["dropped_token_fraction"]) == pytest.approx(1 / 4)
  assert float(metrics["unrouted_fraction"]) == pytest.approx(3 / 4)
