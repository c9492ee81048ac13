"""Counting which tokens each expert took."""

import json

import numpy as np
import pytest

from moe_jax.analysis.routing import ExpertTokenCounts

DECODE = "abcd".__getitem__


def counted(token_ids, expert_ids, valid=None, *, num_experts=2, vocab_size=4):
  counts = ExpertTokenCounts(num_experts, vocab_size)
  token_ids = np.array(token_ids)
  valid = np.ones(token_ids.shape, bool) if valid is None else np.array(valid)
  counts.add(token_ids, np.array(expert_ids), valid)
  return counts


def test_hand_solved_shares_and_lifts():
  # Token a goes to expert 0 three times and to 1 once; b goes to 1 four times.
  counts = counted([0, 0, 0, 0, 1, 1, 1, 1], [[0], [0], [0], [1], [1], [1], [1], [1]])
  np.testing.assert_array_equal(counts.shares(), [3 / 8, 5 / 8])
  np.testing.assert_allclose(
    counts.lifts()[:2], [[(3 / 4) / (3 / 8), (1 / 4) / (5 / 8)], [0, 1 / (5 / 8)]]
  )


def test_each_of_k_choices_counts_once():
  counts = counted([2, 3], [[0, 1], [1, 0]])
  np.testing.assert_array_equal(counts.counts, [[0, 0], [0, 0], [1, 1], [1, 1]])


def test_padding_is_not_counted_nor_its_ids_read():
  counts = counted([[0, 99]], [[[1], [-7]]], [[True, False]])
  assert counts.counts.sum() == counts.counts[0, 1] == 1


def test_choices_that_were_not_made_are_not_counted():
  counts = counted([0, 1], [[0, -1], [1, 0]], [[True, False], [True, True]])
  np.testing.assert_array_equal(counts.counts[:2], [[1, 0], [1, 1]])


def test_batches_add_up_and_their_layout_does_not_matter():
  generator = np.random.default_rng(0)
  tokens, experts = generator.integers(0, 4, (6, 5)), generator.integers(0, 2, (6, 5, 3))
  whole = counted(tokens, experts)
  parts = ExpertTokenCounts(2, 4)
  for row in range(6):
    parts.add(tokens[row], experts[row], np.ones(5, bool))
  np.testing.assert_array_equal(parts.counts, whole.counts)
  assert whole.counts.sum() == 6 * 5 * 3


def test_top_tokens_prefer_telling_over_merely_frequent_or_rare():
  # a: frequent, slightly preferred by expert 0; b: clearly; c: only there but too rare; d: never.
  counts = ExpertTokenCounts(2, 4)
  counts.counts[:] = [[110, 100], [60, 2], [3, 0], [0, 90]]
  top = counts.top_tokens(DECODE, 5)
  assert [entry["token"] for entry in top[0]["top_tokens"]] == ["b", "a"]
  assert [entry["token"] for entry in top[1]["top_tokens"]] == ["d"]
  rare = counts.top_tokens(DECODE, 5, min_count=3)
  assert "c" in [entry["token"] for entry in rare[0]["top_tokens"]]
  assert len(counts.top_tokens(DECODE, 1)[0]["top_tokens"]) == 1


def test_top_tokens_can_be_written_as_json():
  top = counted([0] * 12, [[1]] * 12).top_tokens(DECODE, 3)
  assert json.loads(json.dumps(top)) == top
  assert [entry["share"] for entry in top] == [0.0, 1.0]


def test_a_single_expert_prefers_nothing():
  top = counted([0] * 20 + [1] * 30, [[0]] * 50, num_experts=1).top_tokens(DECODE, 3)
  assert top == [{"share": 1.0, "top_tokens": []}]


def test_nothing_counted_gives_zero_shares():
  top = ExpertTokenCounts(3, 4).top_tokens(DECODE, 3)
  assert top == [{"share": 0.0, "top_tokens": []}] * 3


@pytest.mark.parametrize(
  ("tokens", "experts", "valid", "message"),
  [
    ([0, 1], [0, 1], [True, True], "axis K"),
    ([0, 1], [[0], [1]], [True], "valid"),
    ([0, 4], [[0], [1]], [True, True], "token_ids holds 4"),
    ([0, 1], [[0], [2]], [True, True], "expert_ids holds 2"),
    ([0, 1], [[0], [-1]], [True, True], "expert_ids holds -1"),
  ],
)
def test_arrays_that_do_not_fit_are_refused(tokens, experts, valid, message):
  with pytest.raises(ValueError, match=message):
    counted(tokens, experts, valid)
