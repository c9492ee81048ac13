"""Prepared data sets: tokenised, packed, on disk once, read at random ever after.

Works without TensorFlow: TFDS writes and reads array_record files.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from google.protobuf import json_format

from moe_jax.data.config import DataConfig, check_local
from moe_jax.data.corpus import Corpus, get_corpus, split_documents
from moe_jax.data.packing import FIELDS, Packer, PackingCounts, Record, SpecialIds
from moe_jax.data.splits import HELDOUT_EVERY, Split
from moe_jax.data.tokenizers import Tokenizer, get_tokenizer
from moe_jax.errors import UserError

# Raise it whenever the same corpus, tokenizer and length would give other records.
BUILDER_VERSION = "1.0.0"


@dataclasses.dataclass
class PackedTextConfig(tfds.core.BuilderConfig):
  """The part of a DataConfig that decides what the records hold."""

  corpus: str = ""
  tokenizer: str = ""
  sequence_length: int = 0


class PackedText(tfds.core.GeneratorBasedBuilder):
  """Documents of a registered corpus as packed records (see `packing`), in corpus order.

  The metadata of the data set hold, for each split, the packing counts and `text_bytes`.
  """

  VERSION = tfds.core.Version(BUILDER_VERSION)
  # Beside its code a TFDS builder keeps checksums of downloads. There are none here, and the search
  # for them imports importlib_resources, which TFDS 4.9.10 uses but does not install.
  code_path = None

  def _info(self) -> tfds.core.DatasetInfo:
    shape = (self.builder_config.sequence_length,)
    field = tfds.features.Tensor(shape=shape, dtype=np.int32)
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{self.builder_config.corpus} packed into records of {shape[0]} tokens.",
      features=tfds.features.FeaturesDict({name: field for name in FIELDS}),
      metadata=tfds.core.MetadataDict(),
      disable_shuffling=True,  # Held-out batches follow the corpus; training shuffles on reading.
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, Record]]]:
    del dl_manager  # A corpus brings its own text.
    return {split.value: self._generate_examples(split) for split in Split}

  def _generate_examples(self, split: Split) -> Iterator[tuple[int, Record]]:
    tokenizer = get_tokenizer(self.builder_config.tokenizer)
    special = SpecialIds(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    packer = Packer(self.builder_config.sequence_length, special)
    text_bytes = 0

    def encoded() -> Iterator[np.ndarray]:
      nonlocal text_bytes
      for document in split_documents(get_corpus(self.builder_config.corpus), split):
        text = document.text.encode()
        text_bytes += len(text)
        yield tokenizer.encode(text)

    yield from enumerate(packer.pack(encoded()))
    counts = dataclasses.asdict(packer.counts)
    self.info.metadata[split.value] = {**counts, "text_bytes": text_bytes}


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """A prepared data set.

  Attributes:
    train: records of the training documents; `len` and `[i]`, each a dict of (L,) int32 arrays.
    heldout: records of the held-out documents.
    tokenizer: what made the ids.
    fingerprint: changes whenever the records do (corpus, tokenizer, L, builder version).
    counts: what was packed, for each split.
    text_bytes: UTF-8 bytes of text in each split, separators and special tokens not counted.
    corpus: the source of the documents.
  """

  train: Sequence[Record]
  heldout: Sequence[Record]
  tokenizer: Tokenizer
  fingerprint: str
  counts: Mapping[Split, PackingCounts]
  text_bytes: Mapping[Split, int]
  corpus: Corpus

  @property
  def vocab_size(self) -> int:
    """Number of ids of the tokenizer."""
    return self.tokenizer.vocab_size

  @property
  def heldout_bytes(self) -> int:
    """Bytes of text in the held-out documents: the denominator of bits per byte."""
    return self.text_bytes[Split.HELDOUT]

  @property
  def heldout_targets(self) -> int:
    """Tokens of the held-out documents that a decoder predicts, the eos of each included."""
    return self.counts[Split.HELDOUT].target_tokens

  @functools.cached_property
  def train_text(self) -> bytes:
    """The training documents in UTF-8, joined by newlines; read from the corpus on first use."""
    return self._text(Split.TRAIN)

  @functools.cached_property
  def heldout_text(self) -> bytes:
    """The held-out documents in UTF-8, joined by newlines; read from the corpus on first use."""
    return self._text(Split.HELDOUT)

  def _text(self, split: Split) -> bytes:
    return b"\n".join(document.text.encode() for document in split_documents(self.corpus, split))


def fingerprint(config: DataConfig) -> str:
  """Returns 64 hex digits that change whenever the records do; `data_dir` plays no part."""
  parts = {
    "corpus": get_corpus(config.corpus).digest,
    "tokenizer": get_tokenizer(config.tokenizer).digest,
    "sequence_length": config.sequence_length,
    "heldout_every": HELDOUT_EVERY,
    "builder": BUILDER_VERSION,
  }
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prepare(config: DataConfig) -> PreparedData:
  """Returns the data set of `config`, making it first if it is not there.

  Safe when called by several processes at once, and when one of them is killed: a data set is
  written under another name and renamed when complete.

  Raises:
    UserError: the data directory cannot be written, what is there is damaged, or the corpus has
      nothing to hold out.
  """
  builder = _builder(config)
  if not builder.data_path.exists():
    _make(config, builder)
    builder = _builder(config)
  sources = _open(builder)
  counts, text_bytes = _read_counts(builder)
  return PreparedData(
    train=sources[Split.TRAIN],
    heldout=sources[Split.HELDOUT],
    tokenizer=get_tokenizer(config.tokenizer),
    fingerprint=fingerprint(config),
    counts=counts,
    text_bytes=text_bytes,
    corpus=get_corpus(config.corpus),
  )


def _builder(config: DataConfig) -> PackedText:
  """Returns the TFDS builder; it loads what its directory holds, so ask again after making it."""
  # The digest in the name keeps a corpus that changed from reading what was made before.
  name = f"{config.corpus}-{config.tokenizer}-{config.sequence_length}-{fingerprint(config)[:12]}"
  builder_config = PackedTextConfig(
    name=name,
    corpus=config.corpus,
    tokenizer=config.tokenizer,
    sequence_length=config.sequence_length,
  )
  root = _data_dir(config)
  try:
    with _quiet():
      return PackedText(config=builder_config, data_dir=root, file_format="array_record")
  except (AssertionError, ValueError, json_format.ParseError) as error:
    raise _damaged(os.path.join(root, PackedText.name, name, BUILDER_VERSION), error) from error


def _open(builder: PackedText) -> dict[Split, Sequence[Record]]:
  """Opens the splits; reads the two ends of each, so that a lost or cut file is found here."""
  try:
    sources = {split: builder.as_data_source(split.value) for split in Split}
    for source in sources.values():
      # The reader takes a file cut to 64 KiB for an empty one, and gives None for each field.
      for record in (source[0], source[len(source) - 1]):
        if any(values is None for values in record.values()):
          raise RuntimeError("records are missing")
  except (KeyError, OSError, RuntimeError) as error:
    raise _damaged(os.fspath(builder.data_path), error) from error
  return sources


def _read_counts(builder: PackedText) -> tuple[dict[Split, PackingCounts], dict[Split, int]]:
  """Returns what was packed and the bytes of text, for each split, from metadata.json."""
  try:
    counts = {split: dict(builder.info.metadata[split.value]) for split in Split}
    text_bytes = {split: int(counts[split].pop("text_bytes")) for split in Split}
    return {split: PackingCounts(**counts[split]) for split in Split}, text_bytes
  except (KeyError, TypeError, ValueError) as error:
    raise _damaged(os.fspath(builder.data_path), f"metadata.json: {error}") from error


def _damaged(folder: str, reason: object) -> UserError:
  return UserError(
    f"the prepared data in {folder!r} are damaged ({reason}); "
    "delete that folder to have them made again."
  )


def _data_dir(config: DataConfig) -> str:
  """Returns the root of all prepared data sets."""
  folder = config.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  check_local(folder)
  return os.path.abspath(os.path.expanduser(folder))


def _make(config: DataConfig, builder: PackedText) -> None:
  """Writes the data set, unless another process did while this one waited for the lock."""
  documents = sum(1 for _ in itertools.islice(get_corpus(config.corpus).documents(), HELDOUT_EVERY))
  if documents < HELDOUT_EVERY:
    raise UserError(
      f"corpus {config.corpus!r} has {documents} documents; at least {HELDOUT_EVERY} are needed, "
      f"as every {HELDOUT_EVERY}th is held out."
    )
  target = pathlib.Path(builder.data_path)
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.parent / "lock"):
      if not target.exists():
        _remove_leftovers(target.parent)
        with _quiet():
          builder.download_and_prepare()
  except OSError as error:
    raise UserError(
      f"cannot write prepared data to data_dir {_data_dir(config)!r} ({error}); "
      "set data_dir or TFDS_DATA_DIR to a local folder that can be written."
    ) from error


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
  """Waits for, then holds an exclusive lock; the kernel frees it even from a killed process."""
  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _remove_leftovers(folder: pathlib.Path) -> None:
  """Removes what killed preparations left; only the holder of the folder's lock may call it."""
  for leftover in folder.glob("incomplete.*"):
    shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences what TFDS prints and warns, but for a progress bar on a terminal."""
  verbosity = logging.get_verbosity()
  tfds.display_progress_bar(sys.stderr.isatty())
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)
