"""Packing against a solution by hand, and its promise to lose no token."""

import numpy as np
import pytest

from moe_jax.data.packing import FIELDS, Packer, SpecialIds

SPECIAL = SpecialIds(pad=0, bos=1, eos=2)


def _pack(documents, length):
  packer = Packer(length, SPECIAL)
  return list(packer.pack([np.asarray(d, np.int32) for d in documents])), packer.counts


def test_three_documents_solved_by_hand():
  # The stream is 1 10 11 2 | 1 20 2 | 1 30 31 32 2: 12 tokens, 11 pairs, three records of 4.
  records, counts = _pack([[10, 11], [20], [30, 31, 32]], 4)
  expected = [
    {
      "tokens": [1, 10, 11, 2],
      "targets": [10, 11, 2, 1],
      "segment_ids": [1, 1, 1, 1],
      "positions": [0, 1, 2, 3],
      "loss_mask": [1, 1, 1, 0],
    },
    {
      "tokens": [1, 20, 2, 1],
      "targets": [20, 2, 1, 30],
      "segment_ids": [1, 1, 1, 2],
      "positions": [0, 1, 2, 0],
      "loss_mask": [1, 1, 0, 1],
    },
    {
      "tokens": [30, 31, 32, 0],
      "targets": [31, 32, 2, 0],
      "segment_ids": [1, 1, 1, 0],
      "positions": [0, 1, 2, 0],
      "loss_mask": [1, 1, 1, 0],
    },
  ]
  assert len(records) == len(expected)
  for record, want in zip(records, expected, strict=True):
    assert tuple(record) == FIELDS
    for name in FIELDS:
      assert record[name].dtype == np.int32
      np.testing.assert_array_equal(record[name], want[name], err_msg=name)
  assert (counts.documents, counts.records, counts.target_tokens) == (3, 3, 9)
  assert (counts.boundary_positions, counts.padding_positions) == (2, 1)


@pytest.mark.parametrize("length", [2, 3, 7, 16, 1000])
def test_every_token_after_bos_is_a_target_exactly_once(length):
  rng = np.random.default_rng(0)
  # Every token has its own id, so a target names its place in the stream.
  sizes = rng.integers(0, 20, 30)
  ids = iter(range(10, 10_000))
  documents = [[next(ids) for _ in range(size)] for size in sizes]
  records, counts = _pack(documents, length)
  targets = np.concatenate([r["targets"][r["loss_mask"] == 1] for r in records])
  want = np.concatenate([[*document, SPECIAL.eos] for document in documents])
  np.testing.assert_array_equal(targets, want)
  assert counts.target_tokens == len(want) == sizes.sum() + len(documents)
  assert all(r["tokens"].shape == (length,) for r in records)


@pytest.mark.parametrize("length", [2, 5, 64])
def test_every_position_is_counted_once(length):
  records, counts = _pack([[5] * n for n in (0, 1, 9, 30)], length)
  total = counts.target_tokens + counts.boundary_positions + counts.padding_positions
  assert total == len(records) * length == counts.records * length
  assert counts.padding_positions == sum(int((r["segment_ids"] == 0).sum()) for r in records)
  assert counts.padding_positions < length


def test_masked_positions_are_eos_inputs_or_padding():
  records, _ = _pack([[7, 8], [], [9] * 11], 5)
  for record in records:
    masked = (record["tokens"] == SPECIAL.eos) | (record["segment_ids"] == 0)
    np.testing.assert_array_equal(record["loss_mask"] == 0, masked)


def test_a_stream_that_ends_on_a_record_needs_no_padding():
  # 1 10 11 12 2: five tokens are four pairs, exactly one record.
  records, counts = _pack([[10, 11, 12]], 4)
  assert len(records) == 1 and counts.padding_positions == 0


def test_no_documents_give_no_records():
  records, counts = _pack([], 4)
  assert records == [] and counts.records == 0
