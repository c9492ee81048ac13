"""The whole-group oracles agree with hand-solved cases and with finite differences."""

import numpy as np
import pytest
from oracles import finite_differences, moe, soft_moe, sparsemixer, whole_groups

# Central differences in float64 leave about 1e-9 of values around 1.
TOLERANCE = 1e-7


def test_expert_choice_by_hand():
  # Softmax of ln p is p.
  probs = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2]])
  assignments = whole_groups.expert_choice(np.log(probs), capacity=2)
  taken = [(one.expert, one.slot, one.token, round(one.weight, 6)) for one in assignments]
  assert taken == [
    (0, 0, 0, 0.7),
    (0, 1, 2, 0.5),
    (1, 0, 1, 0.6),
    (1, 1, 2, 0.3),
    (2, 0, 1, 0.3),
    (2, 1, 2, 0.2),
  ]
  masked = whole_groups.expert_choice(np.log(probs), capacity=2, token_mask=[True, True, False])
  assert [one.token for one in masked] == [0, 1, 1, 0, 1, 0]


def test_sinkhorn_reaches_equal_rows_and_columns():
  logits = np.random.default_rng(0).normal(size=(8, 4))
  mask = [True] * 6 + [False] * 2
  matrix = whole_groups.sinkhorn_matrix(logits, iterations=200, token_mask=mask)[:6]
  np.testing.assert_allclose(matrix.sum(axis=0), 1.0)
  np.testing.assert_allclose(matrix.sum(axis=1), 4 / 6)


def test_sparsemixer_by_hand():
  # Best 10: 9.9 is 1 % below and in reach, 9.7 is not. Of the rest the best is 9.9.
  first, second = sparsemixer.picks([[10.0, 9.9, 9.7]], top_k=2)[0]
  assert (first[0], sorted(first[2])) == (0, [0, 1])
  assert first[1] == pytest.approx(1 / (1 + np.exp(-0.1)))
  # 9.7 is 2.02 % below 9.9.
  assert (second[0], second[1], sorted(second[2])) == (1, 1.0, [1])


def test_heun_takes_a_third_of_a_sample_that_is_not_the_likeliest():
  logits, gumbel = [10.0, 9.9, 9.7], [0.0, 1.0, 9.0]
  probability = 1 / (1 + np.exp(0.1))
  expert, weight, _ = sparsemixer.pick(logits, [], gumbel, 0.5)
  assert (expert, weight) == (1, pytest.approx(probability / 3))
  assert sparsemixer.pick(logits, [], gumbel, 0.8)[1] == pytest.approx(probability)
  assert sparsemixer.pick(logits, [], [5.0, 1.0, 9.0], 0.5)[1] == pytest.approx(1 - probability)


def test_sparsemixer_gradients_are_those_of_the_whole_probabilities():
  logits = 5.0 + 0.05 * np.random.default_rng(1).normal(size=(3, 4))
  d_weights = np.random.default_rng(2).normal(size=(3, 4))

  def total(logits):
    chosen = sparsemixer.picks(logits, top_k=2)
    return sum(d_weights[s, e] * w for s, picked in enumerate(chosen) for e, w, _ in picked)

  gradient = sparsemixer.logits_backward(logits, sparsemixer.picks(logits, top_k=2), d_weights)
  # A smaller step than the distance to the threshold of reach.
  numeric = finite_differences.gradient(total, logits)
  np.testing.assert_allclose(gradient, numeric, atol=TOLERANCE)


def test_soft_moe_gradients_equal_finite_differences():
  rng = np.random.default_rng(3)
  x, router, dy = (rng.normal(size=shape) for shape in ((4, 3), (3, 4), (4, 3)))
  experts = [
    {"wi": rng.normal(size=(3, 2)), "wo": rng.normal(size=(2, 3))},
    {"wi": rng.normal(size=(3, 2)), "wo": rng.normal(size=(2, 3))},
  ]
  options = {"capacity": 2, "token_mask": [True, True, False, True]}

  def total(x, router, wi):
    changed = [{"wi": wi, "wo": experts[0]["wo"]}, experts[1]]
    return np.sum(dy * soft_moe.layer(x, router, changed, "silu", **options))

  wi = experts[0]["wi"]
  dx, d_router, d_experts = soft_moe.layer_backward(x, router, experts, "silu", dy, **options)
  numeric = [
    finite_differences.gradient(lambda a: total(a, router, wi), x),
    finite_differences.gradient(lambda a: total(x, a, wi), router),
    finite_differences.gradient(lambda a: total(x, router, a), wi),
  ]
  for actual, expected in zip((dx, d_router, d_experts[0]["wi"]), numeric, strict=True):
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


def test_soft_moe_with_one_slot_gives_every_token_the_mean_through_the_expert():
  rng = np.random.default_rng(4)
  x, expert = (
    rng.normal(size=(3, 2)),
    {"wi": rng.normal(size=(2, 2)), "wo": rng.normal(size=(2, 2))},
  )
  y = soft_moe.layer(x, np.zeros((2, 1)), [expert], "gelu", capacity=1)
  np.testing.assert_allclose(y, np.tile(moe.ffn(x.mean(axis=0), expert, "gelu"), (3, 1)))
