"""The decoder oracle has the properties that define its pieces."""

import math

import numpy as np
import pytest
from oracles import language_model

# Float64 sums of a few dozen terms around 1.
TOLERANCE = 1e-12


def random(*shape, seed=0):
  """Return normal random numbers."""
  return np.random.default_rng(seed).normal(size=shape)


def test_rms_norm_by_hand():
  # mean(3^2, 4^2) = 12.5
  y = language_model.rms_norm([[3.0, 4.0]], np.array([1.0, 2.0]), epsilon=0.0)
  np.testing.assert_allclose(y, [[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]], rtol=TOLERANCE)


def test_rotary_turns_the_halves_by_hand():
  # Width 4, base 100, position 1: channels (0, 2) turn by 1 radian, (1, 3) by 100^(-1/2) = 0.1.
  y = language_model.rotary([[[1.0, 1.0, 0.0, 0.0]]], [1], base=100.0)
  expected = [math.cos(1.0), math.cos(0.1), math.sin(1.0), math.sin(0.1)]
  np.testing.assert_allclose(y[0, 0], expected, rtol=TOLERANCE)


def test_rotary_scores_depend_on_the_distance_only():
  q, k = random(1, 2, 8, seed=1), random(1, 2, 8, seed=2)
  near = language_model.rotary(q, [5])[0] * language_model.rotary(k, [2])[0]
  far = language_model.rotary(q, [105])[0] * language_model.rotary(k, [102])[0]
  np.testing.assert_allclose(near.sum(-1), far.sum(-1), atol=TOLERANCE)


def test_attention_sees_no_later_token():
  q, k, v = random(5, 4, 6, seed=1), random(5, 2, 6, seed=2), random(5, 2, 6, seed=3)
  before = language_model.attention(q, k, v)
  k[3:], v[3:] = 7.0, 7.0
  after = language_model.attention(q, k, v)
  np.testing.assert_array_equal(before[:3], after[:3])
  assert np.abs(before[3:] - after[3:]).max(axis=(1, 2)).min() > 1e-3


def test_grouped_queries_equal_repeated_keys_and_values():
  q, k, v = random(5, 4, 6, seed=1), random(5, 2, 6, seed=2), random(5, 2, 6, seed=3)
  repeated = language_model.attention(q, np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1))
  np.testing.assert_array_equal(language_model.attention(q, k, v), repeated)


def test_packed_segments_equal_separate_sequences():
  weights = {
    "query": random(6, 4, 4, seed=1),
    "key": random(6, 2, 4, seed=2),
    "value": random(6, 2, 4, seed=3),
    "out": random(4, 4, 6, seed=4),
  }
  x, segment_ids = random(7, 6), [1, 1, 1, 2, 2, 2, 2]
  positions = language_model.positions_of(segment_ids)
  assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
  packed = language_model.attention_layer(x, weights, positions=positions, segment_ids=segment_ids)
  separate = [
    language_model.attention_layer(part, weights, positions=range(len(part)))
    for part in (x[:3], x[3:])
  ]
  np.testing.assert_allclose(packed, np.concatenate(separate), atol=TOLERANCE)


def test_padding_is_no_key():
  q, k, v = random(4, 2, 4, seed=1), random(4, 2, 4, seed=2), random(4, 2, 4, seed=3)
  masked = language_model.attention(q, k, v, token_mask=[False, True, True, True])
  alone = language_model.attention(q[1:], k[1:], v[1:])
  np.testing.assert_allclose(masked[1:], alone, atol=TOLERANCE)
  assert not masked[0].any()


def test_cross_entropy_of_equal_logits_is_the_log_of_the_vocabulary():
  logits = np.zeros((3, 8))
  logits[2] = [50.0, 0, 0, 0, 0, 0, 0, 0]
  value = language_model.cross_entropy(logits, [1, 2, 3], token_mask=[True, True, False])
  assert value == pytest.approx(math.log(8))
