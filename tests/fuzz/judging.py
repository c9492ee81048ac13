"""What is asked of every input, damaged or not: success, or one sentence and nothing left behind.

A property is a function of what hypothesis draws; `run_property` draws for it, the same inputs on
every run, and counts them.
"""

import contextlib
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from moe_jax.cli import main
from moe_jax.errors import UserError

# Of one input, on a machine that does other things too; the slowest take two or three.
_MOST_SECONDS = 60
# Beyond what the process has mapped already: an input must not take the machine down.
_MOST_BYTES = 6 << 30


class Late(BaseException):
  """Ends a run at once: hypothesis would try for hours to make a slow input smaller."""


def run_property(check: Callable[..., None], count: int, seed: int, **drawn: Any) -> None:
  """Runs a property on inputs that are a function of the seed.

  Args:
    check: called with a draw of each strategy by its name.
    count: of draws; of equal ones the first alone is an input.
    seed: of the draws.
    **drawn: the strategies.
  """
  settings = hypothesis.settings(
    max_examples=count,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    # Hypothesis would vary its own inputs to explain a failure, for minutes.
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    print_blob=False,
  )
  # Hypothesis reads the names of the arguments off a function of its own.
  run = hypothesis.seed(seed)(
    settings(hypothesis.given(st.fixed_dictionaries(drawn))(_called(check)))
  )
  # It would draw numbers that it finds in the modules loaded so far, which differ from run to run.
  with mock.patch.object(providers, "_get_local_constants", providers.Constants):
    run()


def _called(check: Callable[..., None]) -> Callable[[dict[str, Any]], None]:
  """Returns the property as a function of one mapping, which passes over what it has seen."""
  seen = set()

  def run(values):
    shown = repr(values)
    if shown in seen:
      return
    with bounded():
      check(**values)
    # A failing input is called again by what makes it smaller.
    seen.add(shown)

  return run


@contextlib.contextmanager
def bounded() -> Iterator[None]:
  """Fails what takes too long or too much memory, in place of taking the machine with it."""

  def late(number, frame):
    raise Late(f"took more than {_MOST_SECONDS} seconds")

  before = signal.signal(signal.SIGALRM, late)
  limits = resource.getrlimit(resource.RLIMIT_AS)
  mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (mapped + _MOST_BYTES, limits[1]))
  signal.alarm(_MOST_SECONDS)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def assert_sentence(text: str) -> None:
  """A refusal is one line of words, says more than a name, and shows no Python inside."""
  assert text == text.strip() and "\n" not in text and "\r" not in text, repr(text)
  assert 20 <= len(text) <= 4000 and " " in text, repr(text)
  for sign in ("Traceback", " object at 0x", "<class ", "<function "):
    assert sign not in text, repr(text)


def accepts(function: Callable[[], Any]) -> bool:
  """Calls a function; returns whether it took what it was given. A refusal must be a sentence."""
  try:
    function()
  except UserError as error:
    assert_sentence(str(error))
    return False
  return True


def command_accepts(capsys, *words: str) -> bool:
  """Runs a command line; returns whether it succeeded. A refusal must be a sentence on stderr."""
  capsys.readouterr()
  status = main(list(words))
  said = capsys.readouterr().err
  assert status in (0, 2), (status, said)
  if status == 2:
    (line,) = [each for each in said.splitlines() if each.startswith("moe-jax: error: ")]
    assert said.endswith(f"{line}\n"), said
    assert_sentence(line)
  return status == 0


def contents(folder: Path) -> dict[str, bytes | None]:
  """Every path under a folder, with the bytes of files: equal if nothing was written."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
    for path in sorted(folder.rglob("*"))
  }


class Counter:
  """Counts what became of inputs, for the report of the exhaustive tests."""

  def __init__(self):
    self._started = time.process_time()
    self.accepted, self.refused = 0, 0

  def count(self, accepted: bool) -> None:
    """Enters one input."""
    self.accepted += accepted
    self.refused += not accepted

  def record(self, record_property, configs: int = 1) -> None:
    """Tells the report what was done."""
    record_property("configs", configs)
    record_property("inputs", self.accepted + self.refused)
    record_property("accepted", self.accepted)
    record_property("cpu_seconds", time.process_time() - self._started)
