"""A watchdog: ends a process in which nothing moves any more, after saying where it stands."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

import jax

from moe_jax.errors import EXIT_HUNG

_NAME = "hang-{process}.txt"


class Watchdog:
  """Watches that `beat` is called again in time; use as a context manager.

  A process that waits for another host for ever cannot raise: its main thread is inside a
  collective. So a thread of its own looks at the time, writes the stacks of all threads to
  `hang-<process>.txt` of the run folder and to stderr, and ends the process with status 124.
  """

  def __init__(self, seconds: float, workdir: Path):
    """Prepares a watchdog that starts with the first beat.

    Args:
      seconds: the longest time between two beats; 0 = whatever.
      workdir: the run folder.
    """
    self._seconds, self._workdir = seconds, workdir
    self._last: float | None = None
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self) -> "Watchdog":
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *exception) -> None:
    self._closed.set()

  def beat(self) -> None:
    """Says that a step has ended."""
    self._last = time.monotonic()

  def _watch(self) -> None:
    while not self._closed.wait(self._seconds / 10):
      last = self._last
      if last is not None and time.monotonic() - last > self._seconds:
        self._end()

  def _end(self) -> None:
    path = self._workdir / _NAME.format(process=jax.process_index())
    sentence = (
      f"moe-jax: no step has ended for {self._seconds:g} seconds (faults.watchdog_seconds): the"
      f" stacks of all threads are in {path}; the same command goes on from the last checkpoint"
    )
    # A full disk or a closed terminal must not keep a hung process alive.
    with contextlib.suppress(OSError, ValueError), open(path, "w") as file:
      print(time.strftime("%Y-%m-%dT%H:%M:%S%z"), sentence, file=file, flush=True)
      faulthandler.dump_traceback(file)
    with contextlib.suppress(OSError, ValueError):
      print(sentence, file=sys.stderr, flush=True)
      faulthandler.dump_traceback(sys.__stderr__)
    os._exit(EXIT_HUNG)
