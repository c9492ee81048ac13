"""Folders that appear at once, when they are complete."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moe_jax.errors import UserError


def check_free(folder: Path, flag: str = "") -> None:
  """Refuses a folder that holds something.

  Args:
    folder: where a new one is to be.
    flag: what a command line has in front of it, for the sentence.

  Raises:
    UserError: it exists and is not an empty folder.
  """
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise UserError(f"{flag}{folder} exists and is not an empty folder; give another path")


@contextlib.contextmanager
def draft_of(folder: Path) -> Iterator[Path]:
  """Makes a folder beside `folder` that takes its place in the end, or is removed."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
  try:
    yield draft
    draft.chmod(0o755)
    draft.rename(folder)
  except OSError as error:
    # A full disk names no file.
    if error.filename is None:
      error.filename = str(folder)
    raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
