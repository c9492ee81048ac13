"""A file of lines that only ever grows by whole lines, also on a disk that fills up."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from moe_jax.errors import UserError


class LineFile:
  """Appends lines to a file; one that does not fit leaves nothing of itself."""

  def __init__(self, path: Path, lines: Iterable[str] | None = None):
    """Opens the file.

    Args:
      path: of the file; made if it is absent.
      lines: what it is to hold at first; None = what it holds.

    Raises:
      UserError: it cannot be written.
    """
    self._path = path
    try:
      if lines is not None:
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
          file.writelines(lines)
          file.flush()
          # Or a host that loses power could keep the new name, and nothing of the lines.
          os.fsync(file.fileno())
        os.replace(temporary, path)
      # Unbuffered: a line that the disk refuses must not be tried again when the file is closed.
      self._file = open(path, "ab", buffering=0)
    except OSError as error:
      raise self._refused(error) from error

  def append(self, line: str) -> None:
    """Hands a line to the operating system.

    Raises:
      UserError: it cannot be written; the file ends with the line before.
    """
    end = self._file.tell()
    data = line.encode()
    try:
      while data:
        data = data[self._file.write(data) :]
    except OSError as error:
      with contextlib.suppress(OSError):
        self._file.truncate(end)
      raise self._refused(error) from error

  def sync(self) -> None:
    """Returns when all lines are on disk.

    Raises:
      UserError: they cannot be.
    """
    try:
      os.fsync(self._file.fileno())
    except OSError as error:
      raise self._refused(error) from error

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _refused(self, error: OSError) -> UserError:
    return UserError(
      f"{self._path} cannot be written ({error.strerror}): make room or mend its place, and start"
      " the same command again"
    )
