"""Running the tools of a cloud: every command is a list of words, shown before it runs."""

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a command gave.

  Attributes:
    status: its exit status.
    output: what it wrote to stdout, where that was kept.
    errors: what it wrote to stderr, where that was kept.
  """

  status: int
  output: str = ""
  errors: str = ""

  @property
  def reason(self) -> str:
    """The errors on one line, the last 300 characters."""
    return " ".join(self.errors.split())[-300:] or f"exit status {self.status}"


class Shell:
  """Runs commands, or only prints them.

  Attributes:
    dry_run: print only; every command then succeeds and says nothing.
  """

  def __init__(self, dry_run: bool = False):
    self.dry_run = dry_run

  def keep(self, words: Sequence[str]) -> Outcome:
    """Runs a command and keeps what it writes."""
    return self._run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  def show(self, words: Sequence[str]) -> int:
    """Runs a command whose output goes where ours goes; returns its exit status."""
    return self._run(words).status

  def must(self, words: Sequence[str], remedy: str) -> Outcome:
    """Runs a command that has to succeed.

    Raises:
      UserError: it does not; `remedy` says what to do.
    """
    outcome = self.keep(words)
    if outcome.status:
      raise UserError(f"{shlex.join(words[:5])} ... failed ({outcome.reason}); {remedy}")
    return outcome

  def _run(self, words: Sequence[str], **pipes: Any) -> Outcome:
    # Commands alone go to stdout when nothing runs, so that they can be piped into a file.
    print(shlex.join(words), file=sys.stdout if self.dry_run else sys.stderr, flush=True)
    if self.dry_run:
      return Outcome(0)
    try:
      done = subprocess.run(list(words), text=True, check=False, **pipes)
    except FileNotFoundError as error:
      raise UserError(f"{words[0]} is not installed, or not on the PATH; install it") from error
    return Outcome(done.returncode, done.stdout or "", done.stderr or "")
