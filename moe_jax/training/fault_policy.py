"""What a run does about steps that are not finite, and about loss spikes, within its budget."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from moe_jax.errors import DivergedRun
from moe_jax.training.events import Event
from moe_jax.training.faults_config import FaultsConfig, OnNonfinite


class GoBack(Exception):
  """Asks the loop to restore a checkpoint from before a step, and to pass over its batches.

  Attributes:
    event: which step it was, and its batch.
  """

  def __init__(self, event: Event):
    super().__init__(event["step"])
    self.event = event


class FaultPolicy:
  """Counts bad steps; all processes of a run come to the same answers.

  Attributes:
    used: bad steps so far, over restarts.
    passed: batches that rollbacks have passed over, so that step s trains on batch s + passed,
      counted from 1.
  """

  def __init__(self, config: FaultsConfig):
    self._config = config
    self._pending: list[tuple[int, jax.Array]] = []
    self.used = self.passed = 0

  def state(self) -> dict[str, int]:
    """Returns what a checkpoint keeps."""
    return {"used": self.used, "passed": self.passed}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Takes over what a checkpoint kept; an empty one means nothing yet.

    Raises:
      ValueError: a count that is none.
    """
    counts = [state.get(name, 0) for name in ("used", "passed")]
    if not all(type(count) is int and 0 <= count < 2**31 for count in counts):
      raise ValueError(f"used and passed are {counts}")
    self.used, self.passed = counts

  def watch(self, step: int, finite: jax.Array) -> None:
    """Notes whether a step was finite, without waiting for it."""
    self._pending.append((step, finite))

  def settle(self) -> list[int]:
    """Waits for the steps noted since the last call, and returns those that were not finite."""
    pending, self._pending = self._pending, []
    answers = jax.device_get([finite for _, finite in pending])
    return [step for (step, _), finite in zip(pending, answers, strict=True) if not finite]

  def answer(self, bad: Sequence[int]) -> list[Event]:
    """Returns what to say about bad steps, the budget allowing; a rollback answers the first.

    Raises:
      DivergedRun: they are too many, or not allowed at all.
    """
    if not bad:
      return []
    if self._config.on_nonfinite == OnNonfinite.STOP:
      raise DivergedRun(
        f"the loss or a gradient is not finite at step {bad[0]} (batch {bad[0] + self.passed} of"
        " the data stream): the run has diverged; lower optimizer.learning_rate or"
        " optimizer.clip_norm and start in a new workdir, or pass over such batches with"
        " faults.on_nonfinite = skip or rollback"
      )
    rolling = self._config.on_nonfinite == OnNonfinite.ROLLBACK
    name = "rolled_back" if rolling else "skipped_step"
    reason = "the loss or a gradient is not finite at"
    return [self._counted(name, reason, step) for step in (bad[:1] if rolling else bad)]

  def roll_back_from(self, spike: Event) -> Event:
    """Returns the event of a rollback from a loss spike, the budget allowing.

    Raises:
      DivergedRun: there were too many.
    """
    told = {name: spike[name] for name in ("loss", "median")}
    return self._counted("spike_rolled_back", "the loss spikes at", spike["step"]) | told

  def _counted(self, name: str, reason: str, step: int) -> Event:
    """Takes one of the budget for a step."""
    self.used += 1
    batch = step + self.passed
    if self.used > self._config.budget:
      raise DivergedRun(
        f"{reason} step {step} (batch {batch} of the data stream), and faults.budget ="
        f" {self._config.budget} such steps are used up: the run diverges; lower"
        " optimizer.learning_rate or optimizer.clip_norm, or raise the budget"
      )
    return {"event": name, "step": step, "batch": batch, "used": self.used}
