"""Where the time of a run goes, over all its starts: goodput.json of the run folder.

Every second that a process spends on training belongs to one activity. What a killed process
trained beyond the checkpoint that the next one began from is lost: it is trained again.
"""

import contextlib
import enum
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.sharding.processes import is_first_process
from moe_jax.training.run_folder import write_json

GOODPUT_FILE = "goodput.json"
# A kill loses at most so much of the account.
_SECONDS_BETWEEN_WRITES = 10.0


class Activity(enum.StrEnum):
  """What a second was spent on."""

  INIT = "init"  # before the first step, and going back: data, parameters or a checkpoint
  COMPILE = "compile"  # the first step's call, which returns when it is compiled
  DATA = "data"  # waiting for a batch
  STEP = "step"  # training, and all that is nothing else
  CHECKPOINT = "checkpoint"  # what saving keeps the loop waiting
  EVALUATION = "evaluation"


LOST = "lost"  # steps that were trained again
DOWN = "down"  # between the last that a start tells of itself and the next one


class Goodput:
  """Accounts for the time of this start of a run, beside that of earlier ones."""

  def __init__(self, workdir: Path, begun: float | None = None):
    """Reads the account of earlier starts.

    Args:
      workdir: the run folder.
      begun: `time.monotonic()` when this start began; None = now.

    Raises:
      UserError: the account is damaged.
    """
    now = time.monotonic()
    self._path = workdir / GOODPUT_FILE
    self._earlier = read_starts(workdir)
    self._since = now if begun is None else begun
    self._begun = time.time() - (now - self._since)
    self._seconds = dict.fromkeys(Activity, 0.0)
    self._activity, self._written = Activity.INIT, now
    self._first = self._last = 0
    self._again = 0

  def begin(self, step: int) -> None:
    """Says which step this start has restored; 0 = none."""
    self._first = self._last = step
    self._spend(Activity.STEP)

  def go_back(self, step: int) -> None:
    """Says that the steps after this one will be trained again."""
    self._again += max(0, self._last - step)
    self._last = step

  @contextlib.contextmanager
  def during(self, activity: Activity) -> Iterator[None]:
    """Counts the time within for an activity."""
    before = self._spend(activity)
    try:
      yield
    finally:
      self._spend(before)

  def end_step(self, step: int, *, write: bool = False) -> None:
    """Notes the last step that was trained, and writes the account now and then, or now."""
    self._last = step
    if write or time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
      self.write()

  def write(self) -> None:
    """Writes the account, in the first process.

    Raises:
      UserError: the disk is full.
    """
    self._spend(self._activity)
    self._written = time.monotonic()
    if not is_first_process():
      return
    starts = [*self._earlier, self._start()]
    try:
      write_json(self._path, {"starts": starts, **account(starts)})
    except OSError as error:
      raise UserError(
        f"{self._path} cannot be written ({error.strerror}): make room or mend its place, and"
        " start the same command again"
      ) from error

  def _spend(self, activity: Activity) -> Activity:
    """Books the time since the last call, and returns what it was spent on."""
    now, before = time.monotonic(), self._activity
    self._seconds[before] += now - self._since
    self._since, self._activity = now, activity
    return before

  def _start(self) -> dict[str, Any]:
    return {
      "begun": self._begun,
      "first_step": self._first,
      "last_step": self._last,
      "steps_again": self._again,
      "seconds": {activity.value: seconds for activity, seconds in self._seconds.items()},
    }


def account(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns `seconds` by activity over all starts, and `goodput`.

  Goodput is the share of all seconds, from the first start's first to the last one's last, in which
  steps were trained that counted. Lost steps cost what a step of their start costs on average.
  """
  total = dict.fromkeys([*Activity, LOST, DOWN], 0.0)
  for number, start in enumerate(starts):
    following = starts[number + 1] if number + 1 < len(starts) else None
    trained = start["last_step"] - start["first_step"] + start["steps_again"]
    lost = start["steps_again"]
    if following is not None:
      lost += max(0, start["last_step"] - following["first_step"])
      ended = start["begun"] + sum(start["seconds"].values())
      total[DOWN] += max(0.0, following["begun"] - ended)
    # A start may lose more than its own steps, if it could not restore its own checkpoints.
    wasted = start["seconds"][Activity.STEP] * min(1.0, lost / trained if trained else 0.0)
    for activity in Activity:
      total[activity] += start["seconds"][activity]
    total[Activity.STEP] -= wasted
    total[LOST] += wasted
  whole = sum(total.values())
  seconds = {str(name): value for name, value in total.items()}
  return {"seconds": seconds, "goodput": total[Activity.STEP] / whole if whole else 0.0}


def read_goodput(workdir: Path) -> dict[str, Any] | None:
  """Returns the account of a run; None without one.

  Raises:
    UserError: it is damaged.
  """
  starts = read_starts(workdir)
  return {"starts": starts, **account(starts)} if starts else None


def read_starts(workdir: Path) -> list[dict[str, Any]]:
  """Returns the starts of a run.

  Raises:
    UserError: the account is damaged.
  """
  path = workdir / GOODPUT_FILE
  if not path.exists():
    return []
  try:
    starts = json.loads(path.read_bytes())["starts"]
    account(starts)
    return starts
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(
      f"{path} is damaged ({type(error).__name__}: {error}); delete it: it only tells where time"
      " has gone"
    ) from error


def in_words(account: Mapping[str, Any]) -> str:
  """Returns one line: goodput, and where the rest went."""
  seconds = account["seconds"]
  rest = [f"{name} {value:.1f} s" for name, value in seconds.items() if value >= 0.05]
  starts = len(account["starts"])
  return (
    f"{100 * account['goodput']:.1f}% of {sum(seconds.values()):.1f} s in {starts} start"
    f"{'s' if starts != 1 else ''}   ({', '.join(rest)})"
  )
