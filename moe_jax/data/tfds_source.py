"""Data sets of TFDS as a source of documents, read without TensorFlow."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moe_jax.choices import did_you_mean
from moe_jax.data.files import MissingSourceError
from moe_jax.data.formats import InputFile, Stretch, text_of, tfrecords
from moe_jax.data.images import check_pillow
from moe_jax.data.sources import SourceConfig
from moe_jax.errors import UserError

# Families that TFDS registers only when their module is imported, which it leaves to TensorFlow.
_LAZY = ("text.{0}", "text.{0}.{0}", "translate.{0}", "translate.{1}", "structured.{0}")


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """The training split of a builder, and its held-out split before that if one is named.

  Attributes:
    config: the source.
    builder: of TFDS; its data set is there.
    ignored: no file of a data set is.
  """

  config: SourceConfig
  builder: Any
  ignored: int = 0

  @functools.cached_property
  def _splits(self) -> list[str]:
    return [split for split in (self.config.heldout, self.config.split) if split]

  @functools.cached_property
  def _readers(self) -> "list[_Split]":
    return [_open_split(self.builder, split) for split in self._splits]

  @property
  def size(self) -> int:
    """Records of all splits: how long one is cannot be known before."""
    return sum(len(reader) for reader in self._readers)

  @functools.cached_property
  def digest(self) -> str:
    """Changes with the builder, its config, its version, and the sizes of the splits."""
    facts = [self.builder.info.full_name, self._splits, [len(each) for each in self._readers]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

  @property
  def heldout_streams(self) -> int:
    """The first stream is held out if the config names a split for that."""
    return len(self._splits) - 1

  @property
  def streams(self) -> int:
    """A split is a stream."""
    return len(self._splits)

  def offset(self, stream: int) -> int:
    """Returns the records of all splits before this one."""
    return sum(len(reader) for reader in self._readers[:stream])

  def stretches(self, stream: int, first: int = 0) -> Iterator[Stretch]:
    """Yields the documents of one split."""
    place = f"{self.config.name}, split {self._splits[stream]!r}"
    for number, entry in _numbered(self._readers[stream].entries(first), first, place):
      where = f"{place}, record {number}"
      text = text_of(self._plain(entry), self.config.text, where)
      image = _image_of(entry, self.config.image, where) if self.config.image else None
      yield Stretch(text, True, True, number, image)

  def _plain(self, entry: Any) -> Any:
    """Returns an example with its texts as bytes or str, and the name of the class it is labelled.

    Some readers give texts as arrays of one element.
    """
    from tensorflow_datasets.core.features import ClassLabel

    field, features = self.config.text, self.builder.info.features
    single = {k: v.item() for k, v in entry.items() if getattr(v, "shape", None) == ()}
    if field in entry and isinstance(features[field], ClassLabel):
      label = int(entry[field])
      # TFDS gives -1 to what has no label, as in the test splits of competitions.
      single[field] = "" if label < 0 else features[field].int2str(label)
    return {**entry, **single}


@dataclasses.dataclass(frozen=True)
class _RandomAccess:
  """A split in a format that TFDS reads at random."""

  source: Sequence[Any]

  def __len__(self) -> int:
    return len(self.source)

  def entries(self, first: int) -> Iterator[Any]:
    return map(self.source.__getitem__, range(first, len(self.source)))


@dataclasses.dataclass(frozen=True)
class _Sequential:
  """A split in TFRecord files, as most data sets on disk are."""

  builder: Any
  split: str

  def __len__(self) -> int:
    return self.builder.info.splits[self.split].num_examples

  def entries(self, first: int) -> Iterator[Any]:
    return map(self._decode, itertools.islice(self._records(), first, None))

  def _records(self) -> Iterator[bytes]:
    for path in map(os.fspath, self.builder.info.splits[self.split].filepaths):
      size = os.stat(path).st_size if "://" not in path else 2**62
      yield from (record for record, _ in tfrecords(InputFile(path, path, size)))

  def _decode(self, record: bytes) -> Any:
    return self.builder.info.features.deserialize_example_np(record)


_Split = _RandomAccess | _Sequential


def open_tfds(config: SourceConfig) -> TfdsSource:
  """Finds a data set that TFDS has written, under TFDS_DATA_DIR or ~/tensorflow_datasets.

  Raises:
    MissingSourceError: it is not there.
    UserError: no such builder, config, version or split, or no package that reads images.
  """
  if config.image:
    check_pillow(f"source {config.name}")
  source = TfdsSource(config, _builder(config.builder))
  _ = source._readers
  return source


def _builder(name: str) -> Any:
  import tensorflow_datasets as tfds

  family = name.partition(":")[0].partition("/")[0]
  _import_lazy(family)
  try:
    # On a fault TFDS prints pages.
    with contextlib.redirect_stdout(io.StringIO()):
      return tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
  except tfds.core.DatasetNotFoundError:
    hint = did_you_mean(family, tfds.core.registered.list_imported_builders())
    raise UserError(f"source tfds:{name}: TFDS has no data set {family!r}; {hint}") from None
  except (AssertionError, ValueError, TypeError) as error:
    reason = " ".join(str(error).split())
    raise UserError(
      f"source tfds:{name} is refused by TFDS ({reason}); give tfds:NAME/CONFIG:VERSION as the"
      " catalogue has them, for example tfds:c4/en:3.1.0."
    ) from None
  except ImportError as error:
    raise UserError(
      f"source tfds:{name} needs the package {error.name}, which is not installed: pip install"
      f" {error.name}, or convert the data set to parquet on a machine that has it."
    ) from None


def _import_lazy(family: str) -> None:
  for pattern in _LAZY:
    module = "tensorflow_datasets." + pattern.format(family, family.removesuffix("_translate"))
    try:
      found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
      found = None
    if found is not None:
      importlib.import_module(module)
      return


def _open_split(builder: Any, split: str) -> _Split:
  name = split.partition("[")[0]
  _check_split(builder, name)
  try:
    return _RandomAccess(builder.as_data_source(split))
  except NotImplementedError:
    if not builder.info.splits:
      raise _missing(builder) from None
  except (FileNotFoundError, RuntimeError) as error:
    raise _missing(builder) from error
  if name != split:
    raise UserError(
      f"the TFDS data set in {builder.data_path} is stored as TFRecord, of which split {split!r}"
      f" cannot be cut; take the whole split {name!r}, or write the data set as array_record."
    )
  return _Sequential(builder, split)


def _check_split(builder: Any, name: str) -> None:
  known = list(builder.info.splits)
  if known and name not in known:
    raise UserError(
      f"the TFDS data set {builder.info.full_name} has no split {name!r};"
      f" {did_you_mean(name, known)}"
    )


def _missing(builder: Any) -> MissingSourceError:
  full_name = builder.info.full_name
  return MissingSourceError(
    f"the TFDS data set {full_name} is not in {builder.data_path}; write it with"
    f" tfds build {full_name} --file_format=array_record, or set TFDS_DATA_DIR to where it is."
  )


def _numbered(entries: Iterator[Any], first: int, place: str) -> Iterator[tuple[int, Any]]:
  """Yields entries behind the first ones with their numbers, from 1 over all."""
  number = first
  try:
    for number, entry in enumerate(entries, start=first + 1):
      yield number, entry
  # Of Pillow, which raises the last two of damaged PNGs.
  except (OSError, SyntaxError, ValueError) as error:
    raise UserError(
      f"{place}, record {number + 1} cannot be read ({error}); write the data set again."
    ) from error


def _image_of(entry: Any, field: str, place: str) -> np.ndarray:
  """Returns the image of an example, (rows, columns, channels) uint8."""
  if field not in entry:
    hint = did_you_mean(field, list(entry))
    raise UserError(f"{place} has no field {field!r}; {hint} (option image=FIELD of the source)")
  image = np.asarray(entry[field])
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
    raise UserError(
      f"{place} has {image.dtype} of shape {image.shape} in field {field!r}, expected an image:"
      " uint8 of shape (rows, columns, 1 or 3)."
    )
  return image
