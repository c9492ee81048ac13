"""The manifest of a saved step: what every file and every array of it must be.

`manifest.json` lists size and SHA-256 of each file of the step's folder, and name, shape, dtype and
checksum of each array (see `leaf_checksums`). Beside it `manifest.json.sha256` holds its own hash,
in the format of `sha256sum --check`. Both are written before the folder gets its name, so a step
without them is not one that a kill interrupted, but one that lost them.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError

MANIFEST_FILE = "manifest.json"
HASH_FILE = MANIFEST_FILE + ".sha256"
# Hashing releases the interpreter's lock; more threads than this only wait for the disk.
_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What an array must be.

  Attributes:
    shape: its sizes.
    dtype: NumPy's name of its type.
    checksum: of its values, 16 hex digits.
  """

  shape: tuple[int, ...]
  dtype: str
  checksum: str


@dataclasses.dataclass(frozen=True)
class SavedFile:
  """What a file must be.

  Attributes:
    size: in bytes.
    sha256: of its content, 64 hex digits.
  """

  size: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a saved step must be.

  Attributes:
    step: optimiser steps done.
    saved: seconds since 1970.
    metric: the held-out loss at that step, if it was evaluated.
    leaves: by name, with slashes.
    files: by path in the step's folder, with slashes.
  """

  step: int
  saved: float
  metric: float | None
  leaves: Mapping[str, Leaf]
  files: Mapping[str, SavedFile]

  @property
  def size(self) -> int:
    """Bytes of all files, the manifest's own not counted."""
    return sum(file.size for file in self.files.values())


def write_manifest(
  folder: Path, *, step: int, saved: float, metric: float | None, leaves: Mapping[str, Leaf]
) -> Manifest:
  """Reads every file of a step and writes its manifest beside them."""
  paths = sorted(path for path in folder.rglob("*") if path.is_file())
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    files = dict(zip(_names(folder, paths), pool.map(_describe, paths), strict=True))
  manifest = Manifest(step, saved, metric, dict(leaves), files)
  content = (json.dumps(dataclasses.asdict(manifest), indent=1, allow_nan=False) + "\n").encode()
  _write(folder / MANIFEST_FILE, content)
  _write(folder / HASH_FILE, _hash_line(content))
  return manifest


def read_manifest(folder: Path) -> Manifest:
  """Returns the manifest of a step's folder.

  Raises:
    UserError: it is lost, or not as it was written; says only that, for the caller to complete.
  """
  content, line = _read(folder / MANIFEST_FILE), _read(folder / HASH_FILE)
  if line != _hash_line(content):
    raise UserError(f"{MANIFEST_FILE} and {HASH_FILE} do not belong together")
  try:
    manifest = _parse(json.loads(content))
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(
      f"{MANIFEST_FILE} is of another version of moe_jax ({type(error).__name__}: {error})"
    ) from error
  if str(manifest.step) != folder.name:
    raise UserError(f"{MANIFEST_FILE} is that of step {manifest.step}")
  return manifest


def check_files(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> None:
  """Reads the files of a step and compares them with its manifest.

  Files that the manifest does not name are let be: nothing reads them.

  Args:
    folder: of the step.
    manifest: from `read_manifest`.
    part: which of them to read, if several processes share the work.
    parts: how many processes share it.

  Raises:
    UserError: names the first file that is lost or changed, and says only that.
  """
  mine = sorted(manifest.files.items())[part::parts]
  for name, expected in mine:
    _check_size(folder / name, name, expected.size)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    hashes = pool.map(lambda item: _sha256(folder / item[0], item[0]), mine)
    for (name, expected), found in zip(mine, hashes, strict=True):
      if found != expected.sha256:
        raise UserError(f"{name} has changed (its SHA-256 is another)")


def _check_size(path: Path, name: str, expected: int) -> None:
  try:
    size = path.stat().st_size
  except OSError as error:
    raise _unreadable(name, error) from error
  if size != expected:
    raise UserError(f"{name} has {size} bytes instead of {expected}")


def _sha256(path: Path, name: str) -> str:
  try:
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise _unreadable(name, error) from error


def _describe(path: Path) -> SavedFile:
  return SavedFile(path.stat().st_size, _sha256(path, path.name))


def _names(folder: Path, paths: list[Path]) -> list[str]:
  return [path.relative_to(folder).as_posix() for path in paths]


def _read(path: Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise _unreadable(path.name, error) from error


def _unreadable(name: str, error: OSError) -> UserError:
  if isinstance(error, FileNotFoundError | NotADirectoryError):
    return UserError(f"{name} is missing")
  return UserError(f"{name} cannot be read ({error.strerror})")


def _hash_line(content: bytes) -> bytes:
  return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_FILE}\n".encode()


def _write(path: Path, content: bytes) -> None:
  with path.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _parse(fields: Any) -> Manifest:
  leaves, files = fields["leaves"].items(), fields["files"].items()
  metric = fields["metric"]
  if metric is not None and not math.isfinite(metric):
    raise ValueError(f"the metric is {metric}")
  return Manifest(
    step=int(fields["step"]),
    saved=float(fields["saved"]),
    metric=metric,
    leaves={name: Leaf(tuple(x["shape"]), x["dtype"], x["checksum"]) for name, x in leaves},
    files={name: SavedFile(**file) for name, file in files},
  )
