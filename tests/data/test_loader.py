"""The training stream is exact to resume; evaluation sees every record once."""

import itertools
import json

import numpy as np
import pytest

from moe_jax.data.loader import eval_batches, steps_per_epoch, train_iterator
from moe_jax.data.loader_state import StreamIdentity, restore_state, save_state
from moe_jax.errors import UserError

LENGTH = 3


def _source(records):
  """Returns records whose tokens are their own index + 1."""
  return [
    {"tokens": np.full(LENGTH, i + 1, np.int32), "loss_mask": np.ones(LENGTH, np.int32)}
    for i in range(records)
  ]


def _rows(batches):
  return np.concatenate([batch["tokens"][:, 0] for batch in batches])


def _take(iterator, count):
  return [batch["tokens"] for batch in itertools.islice(iterator, count)]


def test_an_epoch_repeats_no_record_and_epochs_differ():
  iterator = train_iterator(_source(11), batch_size=4, seed=0)
  epochs = [_rows(itertools.islice(iterator, 2)) for _ in range(8)]
  for epoch in epochs:
    assert len(set(epoch)) == 8
  assert len({tuple(epoch) for epoch in epochs}) > 1
  # 3 of 11 are left out of each epoch, but not the same 3 for ever.
  assert set(np.concatenate(epochs)) == set(range(1, 12))


def test_batches_are_int32_of_static_shape():
  batch = next(train_iterator(_source(11), batch_size=4, seed=0))
  assert {(v.shape, v.dtype) for v in batch.values()} == {((4, LENGTH), np.dtype(np.int32))}


def test_the_seed_decides_the_order():
  orders = [
    np.concatenate(_take(train_iterator(_source(20), batch_size=4, seed=s), 5)) for s in (1, 1, 2)
  ]
  np.testing.assert_array_equal(orders[0], orders[1])
  assert (orders[0] != orders[2]).any()


@pytest.mark.parametrize("done", [0, 1, 2, 4, 5, 9])
def test_a_restored_iterator_goes_on_bit_for_bit(done):
  # 10 records in batches of 4 are 2 steps an epoch: every case runs across epoch boundaries.
  first = train_iterator(_source(10), batch_size=4, seed=7)
  _take(first, done)
  state = json.loads(json.dumps(first.get_state()))
  second = train_iterator(_source(10), batch_size=4, seed=7)
  second.set_state(state)
  np.testing.assert_array_equal(_take(first, 6), _take(second, 6))


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batch_of_one_process(process_count):
  whole = _take(train_iterator(_source(21), batch_size=4, seed=5), 12)
  parts = [
    _take(
      train_iterator(
        _source(21), batch_size=4, seed=5, process_index=p, process_count=process_count
      ),
      12,
    )
    for p in range(process_count)
  ]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_a_state_saved_on_two_processes_restores_on_one():
  saved = train_iterator(_source(21), batch_size=4, seed=5, process_index=1, process_count=2)
  _take(saved, 7)
  restored = train_iterator(_source(21), batch_size=4, seed=5)
  restored.set_state(saved.get_state())
  np.testing.assert_array_equal(np.stack(_take(saved, 4)), np.stack(_take(restored, 4))[:, 2:])


def test_saved_state_goes_through_json_and_back():
  identity = StreamIdentity(fingerprint="f", batch_size=4, seed=7)
  first = train_iterator(_source(10), batch_size=4, seed=7)
  _take(first, 3)
  state = json.loads(json.dumps(save_state(first, identity)))
  second = train_iterator(_source(10), batch_size=4, seed=7)
  restore_state(second, state, identity)
  np.testing.assert_array_equal(next(first)["tokens"], next(second)["tokens"])


@pytest.mark.parametrize(
  ("field", "value"), [("fingerprint", "other"), ("batch_size", 8), ("seed", 8)]
)
def test_a_state_of_another_stream_is_refused(field, value):
  identity = StreamIdentity(fingerprint="f", batch_size=4, seed=7)
  iterator = train_iterator(_source(10), batch_size=4, seed=7)
  state = save_state(iterator, identity)
  state["identity"][field] = value
  with pytest.raises(UserError, match=f"data stream has {field}"):
    restore_state(iterator, state, identity)


@pytest.mark.parametrize("records", [8, 9, 11])
def test_evaluation_sees_every_record_once_in_order(records):
  batches = list(eval_batches(_source(records), 4))
  rows = _rows(batches)
  np.testing.assert_array_equal(rows[:records], np.arange(1, records + 1))
  assert not rows[records:].any()
  assert all(batch["tokens"].shape == (4, LENGTH) for batch in batches)
  assert sum(batch["loss_mask"].sum() for batch in batches) == records * LENGTH


def test_evaluation_fills_up_a_batch_larger_than_the_data():
  (batch,) = eval_batches(_source(3), 8)
  np.testing.assert_array_equal(batch["tokens"][:, 0], [1, 2, 3, 0, 0, 0, 0, 0])


def test_processes_evaluate_disjoint_rows_in_as_many_batches():
  parts = [list(eval_batches(_source(9), 4, process_index=p, process_count=2)) for p in (0, 1)]
  whole = [batch["tokens"] for batch in eval_batches(_source(9), 4)]
  joined = [np.concatenate([a["tokens"], b["tokens"]]) for a, b in zip(*parts, strict=True)]
  np.testing.assert_array_equal(joined, whole)


def test_steps_per_epoch_counts_full_batches():
  assert steps_per_epoch(_source(11), 4) == 2


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"batch_size": 11}, "batch_size is 11, but the data set has only 10 records"),
    ({"batch_size": 0}, "batch_size is 0, .* the nearest is 1"),
    ({"batch_size": 5, "process_count": 2}, "batch_size is 5, .* the nearest is 4"),
    ({"process_index": 2, "process_count": 2}, "process_index is 2, but process_count is 2"),
    ({"seed": -1}, "data seed is -1"),
  ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
  with pytest.raises(UserError, match=message):
    train_iterator(_source(10), **{"batch_size": 4, "seed": 0, **arguments})
