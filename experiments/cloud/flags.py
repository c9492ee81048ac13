"""Command lines of launchers: a verb, flags, and after `--` the words of the training."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from moe_jax.errors import UserError


class FlagParser(argparse.ArgumentParser):
  """Reads a verb and flags; what is wrong with them is one sentence.

  Args:
    module: as `python -m` takes it.
    verbs: what each of them does.
  """

  def __init__(self, module: str, verbs: Mapping[str, str]):
    self._module = module
    lines = "\n".join(f"  {verb:9} {text}" for verb, text in verbs.items())
    super().__init__(
      prog=f"python -m {module}",
      description=lines,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    self.add_argument("verb", choices=list(verbs), metavar="VERB")

  def error(self, message: str):
    """Refuses in one sentence.

    Raises:
      UserError: always.
    """
    raise UserError(f"{message}; python -m {self._module} --help lists verbs and flags")


def before_and_after(words: list[str]) -> tuple[list[str], list[str]]:
  """Returns the words before and after `--`.

  Raises:
    UserError: the run folder is after it, where the launcher does not see it.
  """
  cut = words.index("--") if "--" in words else len(words)
  train = words[cut + 1 :]
  for word in train:
    if word.partition("=")[0] == "--workdir":
      raise UserError(f"{word} is refused after --: give it before, where the launcher reads it")
  return words[:cut], train


def write_for_tool(path: Path, text: str) -> None:
  """Writes a file that a tool of the cloud is to read.

  Raises:
    UserError: it cannot be written.
  """
  try:
    path.write_text(text, encoding="utf-8")
  except OSError as error:
    raise UserError(
      f"{path} cannot be written ({error.strerror}); give a place for it as --file=PATH"
    ) from error
