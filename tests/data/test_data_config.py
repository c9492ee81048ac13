"""DataConfig refuses what cannot be prepared."""

import pytest

from moe_jax.data.config import DataConfig
from moe_jax.errors import UserError


def test_defaults_are_valid():
  assert DataConfig().sequence_length == 128


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("corpus", "sotu_1790_1871", "did you mean sotu_1790_1870"),
    ("tokenizer", "bites", "did you mean bytes"),
    ("sequence_length", 1, "sequence_length is 1, but must be an integer of at least 2"),
    ("sequence_length", 128.0, "sequence_length is 128.0"),
    ("sequence_length", True, "sequence_length is True"),
    ("data_dir", "gs://bucket/data", "'gs://bucket/data', but must be a local folder"),
  ],
)
def test_a_bad_value_is_named(field, value, message):
  with pytest.raises(UserError, match=message):
    DataConfig(**{field: value})
