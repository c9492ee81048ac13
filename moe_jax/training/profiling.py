"""Traces of a few steps by `jax.profiler`, at steps of the config or on SIGUSR1."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

_ON_DEMAND = 5
_FOLDER = "profile"


@contextlib.contextmanager
def nothing_to_trace() -> Iterator[None]:
  """Passes over SIGUSR1, which would end the process, where no `Profiler` answers it."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
  try:
    yield
  finally:
    signal.signal(signal.SIGUSR1, before)


class Profiler:
  """Starts and ends traces around steps; use as a context manager.

  A trace is a folder `profile/step_<first>` of the run, which xprof and Perfetto read.
  """

  def __init__(self, planned: tuple[int, int], workdir: Path):
    """Prepares the traces of a run.

    Args:
      planned: (first step, number of steps); 0 steps = none is planned.
      workdir: the run folder.
    """
    self._folder = workdir / _FOLDER
    self._first, self._count = planned
    self._last: int | None = None
    self._asked = False
    self._before: Any = None

  def __enter__(self) -> "Profiler":
    if threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGUSR1, self._ask)
    return self

  def __exit__(self, *exception) -> None:
    self._end()
    if self._before is not None:
      signal.signal(signal.SIGUSR1, self._before)

  def before(self, step: int) -> None:
    """Starts a trace with this step, if one is due."""
    count = _ON_DEMAND if self._asked else self._count if step == self._first else 0
    if not count or self._last is not None:
      return
    self._asked, self._last = False, step + count - 1
    jax.profiler.start_trace(str(self._folder / f"step_{step}"))

  def after(self, step: int, outcome: Any) -> None:
    """Ends the trace that this step is the last of, once what it computes is there."""
    if self._last is not None and step >= self._last:
      jax.block_until_ready(outcome)
      self._end()

  def _ask(self, number: int, frame: Any) -> None:
    self._asked = True

  def _end(self) -> None:
    if self._last is not None:
      self._last = None
      jax.profiler.stop_trace()
