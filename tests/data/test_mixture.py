"""Mixtures hold their weights exactly, resume exactly, and do not depend on the process count."""

import itertools
import json

import numpy as np
import pytest
from data.texts import TEXTS, json_lines

from moe_jax.data.builders import prepare
from moe_jax.data.config import DataConfig
from moe_jax.data.loader import eval_batches, places_in_batch, train_iterator
from moe_jax.data.loader_state import StreamIdentity, restore_state, save_state
from moe_jax.data.mixture import Mixture, Shares
from moe_jax.errors import UserError

SIZES, WEIGHTS = (5, 13, 7), (0.1, 0.6, 0.3)


def _mixture():
  """Returns parts whose records tell their part (hundreds) and their place in it."""
  parts = [
    [{"tokens": np.full(2, 100 * part + i, np.int32)} for i in range(size)]
    for part, size in enumerate(SIZES)
  ]
  return Mixture(tuple(parts), WEIGHTS)


def _rows(iterator, batches):
  return [batch["tokens"][:, 0] for batch in itertools.islice(iterator, batches)]


@pytest.mark.parametrize("weights", [(0.1, 0.6, 0.3), (1, 1), (7, 3), (1,), (1e-3, 1, 0.25, 9)])
def test_shares_are_the_weights_after_any_number_of_records(weights):
  shares, counts = Shares(weights), np.zeros(len(weights), int)
  for n in range(3000):
    part, place = shares[n]
    assert place == counts[part]  # Nothing of a set is skipped or read twice.
    counts[part] += 1
    assert np.abs(counts - (n + 1) * np.array(weights) / sum(weights)).max() < len(weights)


def test_shares_are_exact_at_the_end_of_a_long_run():
  # In floats, 0.1 + 0.2 is not 0.3: after 10**15 records it would show.
  part, place = Shares((0.1, 0.2))[3 * 10**15]
  assert (part, place) == (0, 10**15) or (part, place) == (1, 2 * 10**15)


def test_each_part_goes_through_epochs_of_its_own():
  rows = np.concatenate(_rows(train_iterator(_mixture(), batch_size=4, seed=3), 50))
  for part, (size, share) in enumerate(zip(SIZES, WEIGHTS, strict=True)):
    own = rows[rows // 100 == part]
    assert len(own) == share * 200
    epochs = [tuple(own[i : i + size]) for i in range(0, len(own) - size + 1, size)]
    assert all(len(set(epoch)) == size for epoch in epochs)
    assert len(set(epochs)) > 1


@pytest.mark.parametrize("source", [_mixture(), _mixture().parts[1]], ids=["mixture", "one"])
def test_places_in_a_batch_are_those_of_its_records(source):
  sizes = dict(batch_size=4, seed=3)
  for number, row in enumerate(_rows(train_iterator(source, **sizes), 9)):
    places = places_in_batch(source, **sizes, batch=number)
    assert [source[place]["tokens"][0] for place in places] == list(row)


@pytest.mark.parametrize("count", [2, 4])
def test_row_r_of_batch_t_is_the_same_on_any_number_of_processes(count):
  alone = _rows(train_iterator(_mixture(), batch_size=4, seed=3), 20)
  shared = [
    train_iterator(_mixture(), batch_size=4, seed=3, process_index=p, process_count=count)
    for p in range(count)
  ]
  together = [np.concatenate(rows) for rows in zip(*(_rows(s, 20) for s in shared), strict=True)]
  np.testing.assert_array_equal(together, alone)
  assert len({json.dumps(each.get_state()) for each in shared}) == 1


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1), (2, 4)])
def test_another_number_of_processes_goes_on_exactly(before, after):
  identity = StreamIdentity("mixture", 4, 3)
  whole = _rows(train_iterator(_mixture(), batch_size=4, seed=3), 15)
  first = train_iterator(_mixture(), batch_size=4, seed=3, process_count=before)
  _rows(first, 7)
  state = json.loads(json.dumps(save_state(first, identity)))
  rest = []
  for p in range(after):
    second = train_iterator(_mixture(), batch_size=4, seed=3, process_index=p, process_count=after)
    restore_state(second, state, identity)
    rest.append(_rows(second, 8))
  np.testing.assert_array_equal([np.concatenate(r) for r in zip(*rest, strict=True)], whole[7:])


def test_evaluation_sees_every_record_of_every_part_once():
  rows = [batch["tokens"][:, 0] for batch in eval_batches(_mixture(), 5)]
  assert np.concatenate(rows).tolist() == [
    100 * p + i for p, n in enumerate(SIZES) for i in range(n)
  ]


@pytest.fixture
def config(tmp_path):
  words = []
  for name, weight in (("a", 3), ("b", 1)):
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(json_lines([name * 20 + text for text in TEXTS]))
    words.append(f"{path},weight={weight}")
  return lambda *chosen: DataConfig(
    sources=tuple(words[i] for i in chosen), sequence_length=16, data_dir=str(tmp_path)
  )


def test_a_mixture_is_of_the_same_data_sets_as_its_sources_alone(config, tmp_path):
  both, alone = prepare(config(0, 1)), prepare(config(1))
  assert both.sources[1] == alone.sources[0]
  assert len(list(tmp_path.glob("packed_text/*/manifest.json"))) == 2
  assert both.train.weights == (3.0, 1.0) and len(both.heldout) > len(alone.heldout)
  assert both.text_bytes["heldout"] > alone.text_bytes["heldout"]
  assert both.heldout_bytes + 4 == both.heldout_targets  # Four documents, each with an eos.
  batch = next(train_iterator(both.train, batch_size=8, seed=0))
  assert batch["tokens"].shape == (8, 16)


def test_the_fingerprint_of_a_mixture_follows_its_weights_and_order(config):
  data, order = prepare(config(0, 1)), prepare(config(1, 0))
  assert data.fingerprint != order.fingerprint
  words = tuple(word.replace("weight=3", "weight=2") for word in config(0, 1).sources)
  other = prepare(DataConfig(sources=words, sequence_length=16, data_dir=config(0).data_dir))
  assert other.fingerprint != data.fingerprint
  iterator = train_iterator(data.train, batch_size=4, seed=0)
  state = save_state(iterator, StreamIdentity(data.fingerprint, 4, 0))
  with pytest.raises(UserError, match="data stream has fingerprint"):
    restore_state(iterator, state, StreamIdentity(other.fingerprint, 4, 0))
