"""The choices that define a prepared data set."""

import dataclasses

from moe_jax.data.corpus import get_corpus
from moe_jax.data.images import ImageConfig
from moe_jax.data.sources import SourceConfig, parse_source
from moe_jax.data.tokenizers import get_tokenizer
from moe_jax.errors import UserError

_CORPUS = "sotu_1790_1870"


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What to train on.

  Attributes:
    corpus: name of a registered corpus; read where `sources` is empty.
    sources: what to read instead, one word a source, see `moe_jax.data.sources`; several are mixed
      by their weights.
    tokenizer: `bytes`, or the path of a SentencePiece `.model` or of a `tokenizer.json`.
    sequence_length: L, the tokens in a record.
    image: what becomes of the images beside the texts; none where sources have none.
    data_dir: local folder for prepared data; empty for the TFDS one (the environment variable
      TFDS_DATA_DIR, otherwise ~/tensorflow_datasets).

  Raises:
    UserError: an unknown name or option, a corpus beside sources, the same source twice, a
      sequence_length that is no integer from 2 up or has no room for text beside an image, sources
      of images without `image` or the other way round, or a data_dir that is no local folder.
  """

  corpus: str = _CORPUS
  sources: tuple[str, ...] = ()
  tokenizer: str = "bytes"
  sequence_length: int = 128
  image: ImageConfig | None = None
  data_dir: str = ""

  def __post_init__(self) -> None:
    get_corpus(self.corpus)
    get_tokenizer(self.tokenizer)
    length = self.sequence_length
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
      raise UserError(f"sequence_length is {length!r}, but must be an integer of at least 2.")
    check_local(self.data_dir)
    self._check_sources()
    self._check_images()

  @property
  def parts(self) -> tuple[SourceConfig, ...]:
    """What is read: `sources`, or else `corpus` alone."""
    return tuple(map(parse_source, self.sources or (self.corpus,)))

  def _check_sources(self) -> None:
    if self.sources and self.corpus != _CORPUS:
      raise UserError(
        f"corpus is {self.corpus!r} beside sources {self.sources!r}; leave corpus out, and name it"
        " among the sources if it is one of them."
      )
    names = [dataclasses.replace(part, weight=1.0) for part in self.parts]
    for index, name in enumerate(names):
      if name in names[:index]:
        raise UserError(
          f"sources has {self.sources[index]!r} twice; name it once, with a higher weight."
        )

  def _check_images(self) -> None:
    for part in self.parts:
      if bool(part.image) != (self.image is not None):
        told = (
          "names a field of images, and data.image is none: say in the config file what becomes of"
          " them, as configs/imagenet.py does"
          if part.image
          else "names no field of images, and data.image is given: add the option image=FIELD"
        )
        raise UserError(f"source {part.name!r} {told}.")
    if self.image is not None and self.sequence_length < self.image.tokens + 2:
      raise UserError(
        f"sequence_length is {self.sequence_length}, but an image takes {self.image.tokens} places"
        f" and bos another one; give at least {self.image.tokens + 2}."
      )


def check_local(folder: str) -> None:
  """Raises UserError for a URL: its slashes would make local folders of strange names."""
  if "://" in str(folder):
    raise UserError(
      f"data_dir is {folder!r}, but must be a local folder; mount the bucket, or leave data_dir"
      " empty and TFDS_DATA_DIR unset for ~/tensorflow_datasets."
    )
