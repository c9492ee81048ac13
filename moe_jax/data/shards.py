"""Files of packed records: array_record, written once and read at random."""

import bisect
import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.data.images import unpack_images
from moe_jax.data.manifest import Manifest, StoredFile, damaged
from moe_jax.data.packing import Record, unpack
from moe_jax.data.splits import Split
from moe_jax.errors import UserError

# Records that are read together: a page or so of each file, so that reading one of them at random
# costs little, and its own header and checksum do not double a short record.
_GROUP_BYTES = 1 << 14
_OPEN_FILES = 256


class ShardWriter:
  """Writes one shard under another name; it has its own once it is complete.

  Attributes:
    records: written so far.
    size: bytes of them.
  """

  def __init__(self, path: Path, record_bytes: int):
    from array_record.python import array_record_module

    self._path, self._partial = path, path.with_name(path.name + ".partial")
    group = max(1, _GROUP_BYTES // record_bytes)
    options = f"group_size:{group},uncompressed"
    self._writer = array_record_module.ArrayRecordWriter(str(self._partial), options)
    self.records = self.size = 0

  def write(self, payloads: Iterable[bytes]) -> None:
    """Appends records."""
    for payload in payloads:
      self._writer.write(payload)
      self.records += 1
      self.size += len(payload)

  def close(self, split: Split) -> StoredFile:
    """Returns when the shard is on disk.

    Raises:
      OSError: it is not, as on a full disk.
    """
    self._writer.close()
    with self._partial.open("rb+") as file:
      os.fsync(file.fileno())
    # The writer keeps faults of the disk to itself.
    if _record_count(self._partial) != self.records:
      raise OSError(f"{self._partial} could not be written whole")
    os.replace(self._partial, self._path)
    return StoredFile.of(self._path, split, self.records)


class Records(Sequence[Record]):
  """The records of one split, each a dict of (L,) int32 arrays, and of an image if it has one."""

  def __init__(self, folder: Path, manifest: Manifest, split: Split):
    self._folder, self._files = folder, manifest.files(split)
    self._ends = list(itertools.accumulate(file.records for file in self._files))
    layout = dict(
      length=manifest.sequence_length, pad=manifest.pad_id, dtype=np.dtype(manifest.token_type)
    )
    self._unpack = functools.partial(unpack, **layout)
    if manifest.image is not None:
      self._unpack = functools.partial(unpack_images, config=manifest.image, **layout)

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int) -> Record:
    rows = self.gather([range(len(self))[index]])
    return {name: values[0] for name, values in rows.items()}

  def gather(self, places: Sequence[int]) -> Record:
    """Returns the records at these places as rows, (len(places), L) of each field.

    Threads may call this at the same time.

    Raises:
      UserError: a file is not what was written; names the first record that shows it.
    """
    payloads = [self._payload(place) for place in places]
    try:
      return self._unpack(payloads)
    except (IndexError, ValueError) as error:
      if len(places) > 1:
        for place in places:
          self.gather([place])
      raise self._damaged(places[0], error) from error

  def _payload(self, place: int) -> bytes:
    """Returns a record as it lies on disk."""
    file, within = self._find(place)
    try:
      # One by one: a list of them is read on threads, which costs three times as much.
      return _reader(str(self._folder / file.name), file.sha256).read([within])[0]
    except (IndexError, OSError, RuntimeError, ValueError) as error:
      raise self._damaged(place, error) from error

  def _find(self, place: int) -> tuple[StoredFile, int]:
    """Returns the file that holds a record, and the record's number in it."""
    shard = bisect.bisect_right(self._ends, place)
    return self._files[shard], place - (self._ends[shard] - self._files[shard].records)

  def _damaged(self, place: int, error: Exception) -> UserError:
    file, within = self._find(place)
    return damaged(self._folder, f"{file.name}, record {within}: {error}")


def _record_count(path: Path) -> int:
  from array_record.python import array_record_module

  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    return reader.num_records()
  except (RuntimeError, ValueError):
    return -1


@functools.lru_cache(maxsize=_OPEN_FILES)
def _reader(path: str, sha256: str) -> Any:
  """Returns an open reader, which threads can share; the oldest of many is closed."""
  from array_record.python import array_record_module

  del sha256  # A file made again under the same name is another one.

  return array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
