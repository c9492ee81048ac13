"""Shows how far a preparation is: a bar on a terminal; elsewhere lines, or nothing."""

import datetime
import time

import rich.console
import rich.progress

_SECONDS_BETWEEN_LINES = 10.0


class PreparationProgress:
  """Shows the share of the source that is read, and the speed.

  Without a terminal it prints a line every ten seconds if `lines` is set, otherwise nothing. How
  long is left follows from what this process has read, not from what one before it had.
  """

  def __init__(self, title: str, total: int, *, lines: bool = False):
    self._console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
    self._title, self._total, self._lines = title, total, lines
    self._started = self._last_line = time.monotonic()
    self._first, self._started_reading = None, self._started
    self._bar = self._task = None
    if self._console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[speed]}"),
        console=self._console,
      )
      self._task = self._bar.add_task(title, total=total or None, speed="")
      self._bar.start()

  def update(self, done: int, text_bytes: int) -> None:
    """Shows that `done` of the total is read, and how many bytes of text this process took in."""
    now = time.monotonic()
    if self._first is None:
      self._first, self._started_reading = done, now
    speed = f"{text_bytes / 1e6 / max(now - self._started, 1e-3):.1f} MB/s"
    if self._bar is not None:
      self._bar.update(self._task, completed=done, speed=speed)
    elif self._lines and now - self._last_line >= _SECONDS_BETWEEN_LINES:
      self._last_line = now
      share = f"{100 * done / self._total:.0f}%" if self._total else f"{done}"
      left = self._left(done, now)
      self._console.print(f"{self._title}: {share} read, {speed}{left}", markup=False)

  def _left(self, done: int, now: float) -> str:
    """Returns how long the rest of the source takes at this speed; empty if that is not known."""
    read = done - self._first
    if not self._total or read <= 0:
      return ""
    seconds = (now - self._started_reading) * (self._total - done) / read
    return f", {datetime.timedelta(seconds=round(seconds))} left"

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.stop()
