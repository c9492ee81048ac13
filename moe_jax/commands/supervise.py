"""The command `moe-jax supervise -- train ...`: starts a run again until it is done."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

from moe_jax.errors import EXIT_AGAIN, EXIT_USER, UserError

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ENDING = (signal.SIGTERM, signal.SIGINT)
# Done; a fault that would come back; an interrupt; a closed pipe.
_FINAL = (0, EXIT_USER, 130, 128 + signal.SIGPIPE)
_LONGEST_WAIT = 60.0
_PATIENCE = 1.0


def supervise(args: SimpleNamespace) -> int:
  """Runs a train command, and runs it again after status 75, a crash or a kill.

  SIGTERM and SIGINT go to the command, which saves and ends; it is then not started again. SIGUSR1
  goes to it too.

  Returns:
    The last status of the command; that of a signal is 128 + its number.

  Raises:
    UserError: there is no train command, or a number is out of range.
  """
  command = args.command
  if not command or command[0] != "train":
    given = f", not {command[0]!r}" if command else ""
    raise UserError(
      f"moe-jax supervise takes a train command after --{given}: moe-jax supervise -- train"
      " --config=CONFIG --workdir=DIR"
    )
  if args.restarts < 0 or not args.backoff >= 0:
    raise UserError(
      f"--restarts={args.restarts} --backoff={args.backoff} is refused: both must be at least 0"
    )
  return _Supervisor([sys.executable, "-m", "moe_jax.cli", *command]).run(
    args.restarts, args.backoff
  )


class _Supervisor:
  """Keeps one command running."""

  def __init__(self, words: list[str]):
    self._words = words
    self._child: subprocess.Popen | None = None
    self._ending = threading.Event()

  def run(self, restarts: int, backoff: float) -> int:
    """Runs the command to its end, with at most so many restarts; returns its last status."""
    before = {number: signal.signal(number, self._pass_on) for number in _PASSED_ON}
    try:
      return self._run(restarts, backoff)
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def _run(self, restarts: int, backoff: float) -> int:
    crashes, restart = 0, 0
    while True:
      status = self._once()
      if self._ending.is_set() or status in _FINAL or restart == restarts:
        return status if status >= 0 else 128 - status
      restart += 1
      crashes = 0 if status == EXIT_AGAIN else crashes + 1
      wait = min(backoff * 2 ** max(0, crashes - 1), _LONGEST_WAIT)
      print(
        f"moe-jax supervise: the run ended with status {status}; restart {restart} of {restarts}"
        f" in {wait:g} s",
        file=sys.stderr,
        flush=True,
      )
      if self._wait(wait):
        return status if status >= 0 else 128 - status

  def _once(self) -> int:
    # A group of its own: an interrupt from the terminal comes by way of this process, and once.
    self._child = subprocess.Popen(self._words, process_group=0)
    if self._ending.is_set():
      self._child.send_signal(signal.SIGTERM)
    while True:
      # A signal may interrupt another thread: its handler runs here no sooner than the wait ends.
      with contextlib.suppress(subprocess.TimeoutExpired):
        return self._child.wait(_PATIENCE)

  def _wait(self, seconds: float) -> bool:
    """Waits, or returns True when a signal ends all."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not self._ending.is_set():
      # Event.wait would not be woken by a handler that runs in this same thread.
      time.sleep(min(left, 0.1))
    return self._ending.is_set()

  def _pass_on(self, number: int, frame: Any) -> None:
    if number in _ENDING:
      self._ending.set()
    if self._child is not None and self._child.poll() is None:
      self._child.send_signal(number)
