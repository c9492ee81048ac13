"""Records read together are those read one by one, and damage is found while they are read."""

import numpy as np
import pytest
from data.texts import TEXTS, json_lines, prepared

from moe_jax.data import ingest
from moe_jax.data.batches import stack
from moe_jax.data.loader import eval_batches
from moe_jax.data.mixture import Mixture
from moe_jax.errors import UserError

# Not in order, one twice, some next to each other.
PLACES = (7, 0, 29, 8, 7, 30, 1, 15, 22)


@pytest.fixture
def data(tmp_path, monkeypatch):
  """A data set in several shards."""
  monkeypatch.setattr(ingest, "_BATCH_BYTES", 200)
  monkeypatch.setattr(ingest, "_SHARD_BYTES", 400)
  (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
  return prepared(tmp_path / "a.jsonl", tmp_path)


def _assert_equal(rows, expected):
  assert list(rows) == list(expected)
  for name, values in expected.items():
    assert rows[name].dtype == values.dtype
    np.testing.assert_array_equal(rows[name], values, err_msg=name)


def test_records_read_together_are_those_read_one_by_one(data):
  assert len({file.name for file in data.sources[0].manifest.files("train")}) > 3
  _assert_equal(data.train.gather(PLACES), stack([data.train[place] for place in PLACES]))


def test_a_mixture_reads_from_its_parts_in_the_order_asked_for(data):
  parts = data.train, data.heldout, [data.train[3], data.train[4]]
  mixture, end = Mixture(parts, (1, 1, 1)), sum(map(len, parts))
  places = (end - 1, 2, len(data.train) + 1, 0, end - 2, len(data.train), 5)
  _assert_equal(mixture.gather(places), stack([mixture[place] for place in places]))


def test_evaluation_reads_what_is_there(data):
  batches = list(eval_batches(data.heldout, 3))
  rows = stack([data.heldout[place] for place in range(len(data.heldout))])
  for name, values in rows.items():
    joined = np.concatenate([batch[name] for batch in batches])
    np.testing.assert_array_equal(joined[: len(values)], values)
    assert not joined[len(values) :].any()


def test_a_damaged_record_in_a_batch_is_named(data):
  file = data.sources[0].manifest.files("train")[1]
  path = data.sources[0].folder / file.name
  content = bytearray(path.read_bytes())
  first = data.sources[0].manifest.files("train")[0].records
  content[content.index(data.train[first]["tokens"].astype("<u2").tobytes()) + 4] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match=rf"damaged \({file.name}, record 0: .*delete that folder"):
    data.train.gather(range(len(data.train)))
  assert data.train.gather(range(first))["tokens"].shape == (first, 16)
