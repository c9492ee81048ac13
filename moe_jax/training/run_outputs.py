"""Everything a run says while it trains: rows, events, progress."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from moe_jax.sharding.processes import failing_together, is_first_process
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.events import Event, EventLog
from moe_jax.training.writers import Progress, Row, check_rows, open_writers


class RunOutputs:
  """Writes rows and events, in the first process alone; use as a context manager.

  Opening it drops what was written beyond the restored step, for it will be written again.
  """

  def __init__(
    self, config: ExperimentConfig, workdir: Path, restored_step: int, *, owed: bool = False
  ):
    """Opens the files.

    Args:
      config: of the run.
      workdir: its folder.
      restored_step: the last step that stays.
      owed: whether its row is still to be written.

    Raises:
      UserError: rows up to that step are missing, or a file is damaged or cannot be written.
    """
    last_row = restored_step - owed
    due = (step for step in range(1, last_row + 1) if is_logged(step, config))
    self._stack, self._events = contextlib.ExitStack(), None
    with failing_together():
      if is_first_process():
        check_rows(workdir, last_row, due)
        # Before the rows are cut: events that are refused leave all files as they were.
        events = contextlib.closing(EventLog(workdir, restored_step))
        self._events = self._stack.enter_context(events)
    self._writers = [
      self._stack.enter_context(contextlib.closing(writer))
      for writer in open_writers(config.log, workdir, last_row)
    ]
    self._progress = Progress(
      restored_step, config.steps, workdir.name, quiet=not is_first_process()
    )
    self._stack.enter_context(contextlib.closing(self._progress))

  def __enter__(self) -> "RunOutputs":
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def close(self) -> None:
    """Closes the files."""
    self._stack.close()

  def row(self, row: Row) -> None:
    """Writes and shows a row."""
    for writer in self._writers:
      writer.write(row)
    self._progress.update(row)

  def events(self, events: Sequence[Event], *, aloud: bool = True) -> None:
    """Writes events, and shows one line each."""
    for event in events:
      if self._events is not None:
        self._events.write(event | {"text": event_text(event), "time": time.time()})
      if aloud:
        self.say(event_text(event))

  def say(self, text: str) -> None:
    """Shows a line."""
    self._progress.say(text)

  def sync(self) -> None:
    """Returns when all rows are on disk."""
    for writer in self._writers:
      writer.sync()


class Clock:
  """Turns a step's metrics into a row, with the speed since the last one."""

  def __init__(self, config: ExperimentConfig):
    self._tokens_per_step = config.batch_size * config.data.sequence_length
    self._step, self._time = None, None

  def row(self, step: int, metrics: dict[str, jax.Array]) -> Row:
    """Fetches the metrics, which waits for the step, and reads the clock."""
    values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
    now = time.monotonic()
    speed = None
    # The first interval holds the compilation: it has no speed.
    if self._step is not None:
      speed = (step - self._step) * self._tokens_per_step / (now - self._time)
    self._step, self._time = step, now
    return {
      "step": step,
      **values,
      "tokens": step * self._tokens_per_step,
      "tokens_per_second": speed,
    }

  def restart(self, step: int) -> None:
    """Leaves the time since the last row, spent on evaluation, out of the next interval."""
    if self._step is not None:
      self._step, self._time = step, time.monotonic()


def is_due(step: int, every: int, last: int) -> bool:
  """Tells whether something is due that happens now and then, and at the last step."""
  return step == last or step % every == 0


def is_logged(step: int, config: ExperimentConfig) -> bool:
  """Tells whether a step has a row."""
  return any(is_due(step, every, config.steps) for every in (config.eval.every, config.log.every))


def event_text(event: Event) -> str:
  """Returns an event as one line."""
  texts: dict[str, Any] = {
    "started": "started after step {step}",
    "stopped": "told to end: step {step} is saved",
    "skipped_step": "step {step} is not finite: batch {batch} skipped ({used} so far)",
    "rolled_back": "step {step} is not finite: back to step {restored}, on after batch {batch}"
    " ({used} so far)",
    "loss_spike": "loss spike at step {step}: {loss:.3f}, median before {median:.3f}",
    "spike_rolled_back": "loss spike at step {step}, {loss:.3f}, median before {median:.3f}: back"
    " to step {restored}, on after batch {batch} ({used} so far)",
    "expert_collapse": "layer {layer} collapses at step {step}: {dead_experts} of {num_experts}"
    " experts get no token, max violation {max_violation:.2f}",
  }
  text = texts.get(event["event"])
  try:
    return text.format(**event) if text else f"{event['event']} at step {event['step']}"
  except (KeyError, ValueError):
    return f"{event['event']} at step {event['step']}"
