"""Signals that ask a run to end: it finishes its step, saves, and the same command goes on."""

import os
import signal
import threading
from typing import Any

import jax

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
  """Notes SIGTERM and SIGINT while it is open; use as a context manager.

  A process alone keeps the request until it is asked for. Where JAX has joined processes, it has a
  handler of SIGTERM of its own, by which they agree on the step to end at: that stays, and SIGINT
  is handed on to it. A second SIGINT ends the process at once, as without any of this.

  Off the main thread, where Python allows no handlers, nothing is noted.
  """

  def __init__(self):
    self._requested = False
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      joined = jax.distributed.is_initialized()
      for number in _SIGNALS[1:] if joined else _SIGNALS:
        handler = self._hand_on if joined else self._note
        self._before[number] = signal.signal(number, handler)
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def __bool__(self) -> bool:
    """Tells whether this process, being alone, was asked to end."""
    return self._requested

  def _note(self, number: int, frame: Any) -> None:
    self._requested = True
    self._end_at_the_next_interrupt(number)

  def _hand_on(self, number: int, frame: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    self._end_at_the_next_interrupt(number)

  def _end_at_the_next_interrupt(self, number: int) -> None:
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)
