"""Pairs hold every token of a record once, and spans are drawn as T5 draws them."""

import numpy as np
import pytest

from moe_jax.data.loader import eval_batches, train_iterator
from moe_jax.data.objectives import ObjectiveConfig, PairMaker, span_counts, span_mask
from moe_jax.data.packing import FIELDS
from moe_jax.errors import UserError

START, V = 1, 100


def record(length=20, padding=0, first=10):
  tokens = np.arange(first, first + length, dtype=np.int32)
  real = (np.arange(length) < length - padding).astype(np.int32)
  values = {"tokens": tokens * real, "segment_ids": real}
  return {name: values.get(name, np.zeros(length, np.int32)) for name in FIELDS}


def maker(kind, **fields):
  return PairMaker(ObjectiveConfig(kind, **fields), START, V)


def rng(seed=0):
  return np.random.default_rng(seed)


def test_the_second_half_is_asked_of_the_first():
  pair = maker("second_half")(record(7), rng())
  np.testing.assert_array_equal(pair["source_tokens"], [10, 11, 12])
  np.testing.assert_array_equal(pair["tokens"], [START, 13, 14, 15])
  np.testing.assert_array_equal(pair["targets"], [13, 14, 15, 16])
  np.testing.assert_array_equal(pair["loss_mask"], [1, 1, 1, 1])


@pytest.mark.parametrize("seed", range(20))
def test_names_and_spans_restore_the_record(seed):
  pair = maker("span_corruption", noise_density=0.4, mean_span_length=2.0)(record(), rng(seed))
  hidden = {}
  for token in pair["targets"]:
    if token > V - 20:
      hidden[int(token)] = []
    else:
      hidden[max(hidden) if len(hidden) == 1 else min(hidden)].append(int(token))
  restored = []
  for token in pair["source_tokens"]:
    restored += hidden[int(token)] if int(token) in hidden else [int(token)]
  assert restored == list(range(10, 30))
  # V - 1, V - 2, ... in order, the same on both sides.
  names = [V - 1 - i for i in range(len(hidden))]
  assert list(hidden) == [t for t in pair["source_tokens"] if t > V - 20] == names
  np.testing.assert_array_equal(pair["tokens"][1:], pair["targets"][:-1])
  assert pair["tokens"][0] == START


def test_padding_is_no_source_and_no_target():
  for kind in ("second_half", "span_corruption"):
    pair = maker(kind, noise_density=0.5)(record(20, padding=6), rng())
    source = pair["source_tokens"][pair["source_segment_ids"] > 0]
    targets = pair["targets"][pair["loss_mask"] > 0]
    tokens = [t for t in (*source, *targets) if t <= V - 20]
    assert sorted(tokens) == list(range(10, 24))
    assert np.all(pair["targets"][pair["loss_mask"] == 0] == 0)
    np.testing.assert_array_equal(pair["segment_ids"], pair["loss_mask"])


@pytest.mark.parametrize(
  ("length", "density", "span", "hidden", "spans"),
  [(512, 0.15, 3.0, 77, 26), (2, 0.15, 3.0, 1, 1), (4, 0.9, 1.0, 3, 1), (100, 0.5, 1.0, 50, 50)],
)
def test_the_number_of_hidden_tokens_and_spans_is_fixed(length, density, span, hidden, spans):
  config = ObjectiveConfig("span_corruption", density, span)
  assert span_counts(length, config) == (hidden, spans)
  for seed in range(5):
    mask = span_mask(length, config, rng(seed))
    assert mask.sum() == hidden
    assert np.sum(np.diff(mask.astype(int), prepend=0) == 1) == spans
    assert not mask[0] and mask[-1]


def test_every_choice_of_spans_is_as_likely():
  # Two spans of 4 tokens and two gaps of 4: 3 x 3 ways to cut.
  config = ObjectiveConfig("span_corruption", 0.5, 2.0)
  generator = rng()
  found, counts = np.unique(
    [span_mask(8, config, generator) for _ in range(9000)], axis=0, return_counts=True
  )
  assert len(found) == 9
  # Five standard deviations of a count.
  assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(1000 * 8 / 9))


def test_spans_differ_by_epoch_and_are_the_same_again():
  source = [record(first=10 + 20 * i) for i in range(3)]
  pairs = maker("span_corruption", noise_density=0.4)

  def epochs(seed):
    batches = train_iterator(source, batch_size=3, seed=seed, transform=pairs)
    return [next(batches)["source_tokens"] for _ in range(3)]

  first, again, other = epochs(0), epochs(0), epochs(1)
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(np.sort(first[0], axis=0), np.sort(first[1], axis=0))
  assert not np.array_equal(first[0], other[0])


def test_an_iterator_of_pairs_goes_on_where_it_was():
  source = [record(first=10 + i) for i in range(6)]
  pairs = maker("span_corruption", noise_density=0.4)
  batches = train_iterator(source, batch_size=2, seed=3, transform=pairs)
  next(batches)
  state = batches.get_state()
  expected = [next(batches)["targets"] for _ in range(5)]
  resumed = train_iterator(source, batch_size=2, seed=3, transform=pairs)
  resumed.set_state(state)
  np.testing.assert_array_equal([next(resumed)["targets"] for _ in range(5)], expected)


def test_evaluation_asks_the_same_whatever_the_batch():
  source = [record(first=10 + i) for i in range(5)]
  pairs = maker("span_corruption", noise_density=0.4)
  whole = np.concatenate([b["targets"] for b in eval_batches(source, 5, transform=pairs)])
  cut = np.concatenate([b["targets"] for b in eval_batches(source, 2, transform=pairs)])
  np.testing.assert_array_equal(cut[:5], whole)
  assert not cut[5:].any()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(kind="next_tokens"), "did you mean .next_token"),
    (dict(noise_density=0.0), "above 0 and below 1"),
    (dict(mean_span_length=0.5), "at least 1"),
  ],
)
def test_impossible_objectives_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    ObjectiveConfig(**fields)
