"""The choices that define a prepared data set."""

import dataclasses

from moe_jax.data.corpus import get_corpus
from moe_jax.data.tokenizers import get_tokenizer
from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What to train on.

  Attributes:
    corpus: name of a registered corpus.
    tokenizer: name of a tokenizer.
    sequence_length: L, the tokens in a record.
    data_dir: local folder for prepared data; empty for the TFDS one (the environment variable
      TFDS_DATA_DIR, otherwise ~/tensorflow_datasets).

  Raises:
    UserError: an unknown name, a sequence_length that is no integer from 2 up, or a data_dir that
      is no local folder.
  """

  corpus: str = "sotu_1790_1870"
  tokenizer: str = "bytes"
  sequence_length: int = 128
  data_dir: str = ""

  def __post_init__(self) -> None:
    get_corpus(self.corpus)
    get_tokenizer(self.tokenizer)
    length = self.sequence_length
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
      raise UserError(f"sequence_length is {length!r}, but must be an integer of at least 2.")
    check_local(self.data_dir)


def check_local(folder: str) -> None:
  """Raises UserError for a URL: its slashes would make local folders of strange names."""
  if "://" in str(folder):
    raise UserError(
      f"data_dir is {folder!r}, but must be a local folder; mount the bucket, or leave data_dir"
      " empty and TFDS_DATA_DIR unset for ~/tensorflow_datasets."
    )
