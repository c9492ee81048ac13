"""What a result comes from: the version of this code, the packages, the devices."""

import platform
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# What this package asks for, and what it uses if it is there; the closure of these is recorded.
_PACKAGES = (
  "absl-py",
  "array_record",
  "flax",
  "grain",
  "jax",
  "ml-collections",
  "numpy",
  "optax",
  "orbax-checkpoint",
  "pillow",
  "rich",
  "safetensors",
  "scipy",
  "sentencepiece",
  "tensorboardX",
  "tensorflow-datasets",
  "tokenizers",
)
_NAME = re.compile(r"[A-Za-z0-9._-]+")


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


def package_versions() -> dict[str, str]:
  """Returns the versions of Python and of all installed packages that this one stands on."""
  found, waiting = {}, list(_PACKAGES)
  while waiting:
    name = _canonical(waiting.pop())
    if name in found:
      continue
    try:
      distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
      continue
    found[name] = distribution.version
    waiting += _needs(distribution)
  return {"python": platform.python_version()} | dict(sorted(found.items()))


def _needs(distribution: metadata.Distribution) -> Iterator[str]:
  """Yields the names of what a package requires, that of its extras left out."""
  for requirement in distribution.requires or ():
    if "extra ==" not in requirement:
      yield _NAME.match(requirement)[0]


def _canonical(name: str) -> str:
  """Returns the one spelling of a package's name (PEP 503)."""
  return re.sub(r"[-_.]+", "-", name).lower()
