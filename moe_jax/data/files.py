"""Folders, globs and files as a source of documents."""

import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Iterator

from moe_jax.data.formats import InputFile, Stretch, format_of, read_documents
from moe_jax.data.sources import SourceConfig
from moe_jax.errors import UserError

_FORMATS = ".txt, .jsonl, .json (all three also .gz or .xz), .parquet, .tfrecord, .array_record"
_COMMAND = "moe-jax data prepare"


class MissingSourceError(UserError):
  """The documents are not there; what was prepared of them before may be."""


@dataclasses.dataclass(frozen=True)
class FileSource:
  """Text files, in the order of their names.

  Attributes:
    config: the source.
    files: all files of a known format.
    ignored: files in folders whose suffix names no format, or that are hidden.
  """

  config: SourceConfig
  files: tuple[InputFile, ...]
  ignored: int = 0

  @property
  def size(self) -> int:
    """Bytes of all files."""
    return sum(file.size for file in self.files)

  @functools.cached_property
  def digest(self) -> str:
    """Changes whenever a file is added, removed, renamed, or written again."""
    facts = [(file.name, file.size, _written(file.path)) for file in self.files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

  @property
  def heldout_streams(self) -> int:
    """No file is held out as a whole."""
    return 0

  @property
  def streams(self) -> int:
    """A file is a stream."""
    return len(self.files)

  def stretches(self, stream: int, first: int = 0) -> Iterator[Stretch]:
    """Yields the documents of one file."""
    return itertools.islice(read_documents(self.files[stream], self.config), first, None)

  def offset(self, stream: int) -> int:
    """Returns the bytes of all files before this one."""
    return self._offsets[stream]

  @functools.cached_property
  def _offsets(self) -> list[int]:
    offsets = [0]
    for file in self.files:
      offsets.append(offsets[-1] + file.size)
    return offsets


def open_files(config: SourceConfig) -> FileSource:
  """Lists the files of a source.

  Raises:
    MissingSourceError: there are none.
    UserError: none has a known format, or a bucket cannot be read.
  """
  name = config.name
  if "://" in name:
    found, ignored = _in_bucket(name)
  else:
    found, ignored = _on_disk(os.path.expanduser(name))
  if not found and not ignored:
    raise MissingSourceError(
      f"source {name!r} has no files; give an existing folder, file or glob, or mend"
      f" --config.data.sources, and run {_COMMAND} again."
    )
  if not found:
    raise UserError(
      f"source {name!r} has {ignored} files and none of a known format; expected {_FORMATS}."
    )
  return FileSource(config, tuple(sorted(found, key=lambda file: file.name)), ignored)


def _on_disk(path: str) -> tuple[list[InputFile], int]:
  if os.path.isdir(path):
    return _in_folder(path)
  if os.path.isfile(path):
    return [_named(path)], 0
  found, ignored = [], 0
  for each in glob.glob(path, recursive=True):
    if os.path.isdir(each):
      inner, skipped = _in_folder(each)
      found += [dataclasses.replace(file, name=file.path) for file in inner]
      ignored += skipped
    elif os.path.isfile(each):
      found.append(_named(each))
    else:
      ignored += 1
  return found, ignored


def _named(path: str) -> InputFile:
  """Returns a file that the user named, by itself or by a glob."""
  if format_of(path) is None:
    raise UserError(
      f"{path} has a suffix of no known format; expected {_FORMATS}: rename it, or convert it."
    )
  return InputFile(path, path, os.stat(path).st_size)


def _in_folder(folder: str) -> tuple[list[InputFile], int]:
  found, ignored, pending, seen = [], 0, [folder], set()
  while pending:
    current = pending.pop()
    # A link can lead back to a folder that holds it.
    if os.path.realpath(current) in seen:
      continue
    seen.add(os.path.realpath(current))
    with os.scandir(current) as entries:
      for entry in entries:
        if entry.is_dir() and not entry.name.startswith("."):
          pending.append(entry.path)
        elif entry.is_file() and not entry.name.startswith(".") and format_of(entry.name):
          name = os.path.relpath(entry.path, folder).replace(os.sep, "/")
          found.append(InputFile(entry.path, name, entry.stat().st_size))
        else:
          ignored += 1
  return found, ignored


def _in_bucket(name: str) -> tuple[list[InputFile], int]:
  from etils import epath

  try:
    path = epath.Path(name)
    if "*" in name:
      head, _, pattern = name.partition("*")
      parent, _, start = head.rpartition("/")
      paths = list(epath.Path(parent).glob(f"{start}*{pattern}"))
    elif path.is_dir():
      paths = list(path.rglob("*"))
    else:
      paths = [path] if path.exists() else []
    files = [each for each in paths if not each.is_dir()]
    known = [each for each in files if format_of(each.name)]
    sizes = [each.stat().length for each in known]
  except ImportError:
    raise UserError(
      f"source {name!r} needs the package gcsfs, which is not installed: pip install"
      " 'moe_jax[gcs]', or copy the files to a disk."
    ) from None
  # What a bucket's client raises is its own affair; all of it means the same here.
  except Exception as error:
    raise UserError(
      f"source {name!r} cannot be read ({' '.join(str(error).split())}); check the name and the"
      " rights of this machine on it."
    ) from error
  found = [InputFile(str(p), str(p), n) for p, n in zip(known, sizes, strict=True)]
  return found, len(files) - len(known)


def _written(path: str) -> int:
  """Returns when a local file was written last, in nanoseconds; 0 in a bucket."""
  return 0 if "://" in path else os.stat(path).st_mtime_ns
