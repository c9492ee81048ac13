"""A run on slices that may be taken away: brought up, trained, brought up again, until it is done.

absent -> create -> coming -> ready -> train -> done, and lost -> delete -> absent, so that a run
which is started again finds its place whatever happened to it or to the launcher.
"""

import dataclasses
import math
import sys
import time

from experiments.cloud.gcloud import Slices, State
from moe_jax.errors import UserError

DONE, FAILED, REFUSED, AGAIN = 0, 1, 2, 75
# The status of ssh itself: the connection was lost, not the run.
_DISCONNECTED = 255
# Google tells of a preemption some time after the hosts are gone.
_LOOKS = 3
_SCARCE = ("quota", "resource_exhausted", "no more capacity", "not enough resources", "stockout")


class RunFailed(Exception):
  """The training failed by itself: starting it again would repeat it."""


@dataclasses.dataclass(frozen=True)
class Patience:
  """How long to go on.

  Attributes:
    pause: seconds between two looks, and between two tries to get slices.
    tries: to get slices where quota or capacity is exhausted.
    restarts: of the training.
  """

  pause: float = 60.0
  tries: int = 10
  restarts: int = 100

  def __post_init__(self):
    if not 0 <= self.pause < math.inf or self.tries < 1 or self.restarts < 0:
      raise UserError(
        f"--pause={self.pause}, --tries={self.tries}, --restarts={self.restarts} is refused: the"
        " pause and the restarts are at least 0, the tries at least 1"
      )


def run(slices: Slices, patience: Patience) -> None:
  """Trains to the end, on as many slices one after the other as it takes.

  Raises:
    UserError: slices cannot be had, or the training refuses what it is given.
    RunFailed: the training failed while its slices were there, or too often.
  """
  for _ in range(patience.restarts + 1):
    bring_up(slices, patience)
    what, status = "setting the hosts up", slices.prepare()
    if status == DONE:
      what, status = "the training", slices.train()
    elif status in (REFUSED, AGAIN):
      status = FAILED  # These mean something from the training alone.
    if status == DONE:
      if slices.push():
        say(f"the copy to {slices.request.bucket} failed; run again to repeat it")
      return
    say(f"{what} ended with status {status}")
    _check_worth(slices, what, status, patience)
  raise RunFailed(f"gave up after {patience.restarts} restarts; run resume to go on")


def bring_up(slices: Slices, patience: Patience) -> None:
  """Returns when the slices are ready; those that are lost are deleted and asked for again.

  Raises:
    UserError: they cannot be had.
  """
  last = None
  while True:
    state, word = slices.state()
    if word != last:
      say(f"{slices.request.name}: {word}")
    last = word
    if state is State.READY:
      return
    if state is State.ABSENT:
      _create(slices, patience)
    elif state is State.LOST:
      slices.delete()
    else:
      time.sleep(patience.pause)


def take_down(slices: Slices, patience: Patience) -> None:
  """Deletes the slices; nothing is done where there are none."""
  while True:
    state, word = slices.state()
    if state is State.ABSENT:
      say(f"{slices.request.name} does not exist: nothing to delete")
      return
    if state is not State.GOING or word == "SUSPENDING":
      slices.delete()
      return
    time.sleep(patience.pause)


def _create(slices: Slices, patience: Patience) -> None:
  for remaining in reversed(range(patience.tries)):
    outcome = slices.create()
    if outcome.status == 0:
      return
    if "ALREADY_EXISTS" in outcome.errors:
      return  # An earlier try was answered with an error and yet succeeded.
    if not any(word in outcome.errors.lower() for word in _SCARCE):
      raise UserError(f"{slices.request.name} cannot be created: {outcome.reason}")
    if remaining:
      say(f"no slice yet ({outcome.reason}); {remaining} tries left")
      time.sleep(patience.pause)
  raise UserError(
    f"no {slices.request.piece.accelerator_type} in {slices.request.zone} after {patience.tries}"
    f" tries ({outcome.reason}): ask for quota, or give another --zone, --provisioning or --tries"
  )


def _check_worth(slices: Slices, what: str, status: int, patience: Patience) -> None:
  """Returns if the training is to be started again.

  Raises:
    UserError: it refused what it was given.
    RunFailed: it failed on slices that are still there.
  """
  if status == AGAIN:
    return
  looks = 1 if status == REFUSED else _LOOKS
  for look in range(looks):
    if look:
      time.sleep(patience.pause)
    if slices.state()[0] is not State.READY:
      return
  if status == REFUSED:
    raise UserError("the training refuses what it was given: its last line says what to change")
  if status != _DISCONNECTED:
    raise RunFailed(f"{what} failed with status {status}: its last lines say why")


def say(text: str) -> None:
  """Tells what happens, apart from what commands write."""
  print(text, file=sys.stderr, flush=True)
