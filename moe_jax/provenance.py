"""Which version of this code a result comes from."""

import subprocess
from pathlib import Path


def source_commit() -> str | None:
  """Returns the git commit of this code, "-dirty" behind it if changed; None outside a checkout."""
  try:
    git = subprocess.run(
      ["git", "describe", "--always", "--dirty", "--exclude=*"],
      cwd=Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return git.stdout.strip()
