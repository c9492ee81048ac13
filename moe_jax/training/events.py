"""What happened to a run beside its metrics: one JSON object a line in events.jsonl."""

import json
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.training.append_only import LineFile

EVENTS_FILE = "events.jsonl"

Event = dict[str, Any]


class EventLog:
  """Appends events, each with the optimiser step it belongs to; only one process of a run writes.

  Opening it drops events beyond the restored step: what led to them will happen again.
  """

  def __init__(self, workdir: Path, restored_step: int):
    path = workdir / EVENTS_FILE
    kept = [event for event in read_events(workdir) if event["step"] <= restored_step]
    self._file = LineFile(path, [json.dumps(event) + "\n" for event in kept])

  def write(self, event: Event) -> None:
    """Writes one event.

    Raises:
      UserError: the disk is full.
    """
    self._file.append(json.dumps(event, allow_nan=False) + "\n")

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def read_events(workdir: Path) -> list[Event]:
  """Returns a run's events; a last line that a kill cut short is left out.

  Raises:
    UserError: another line is no event.
  """
  path = workdir / EVENTS_FILE
  if not path.exists():
    return []
  events = []
  for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
    if not line.endswith(b"\n"):
      break
    try:
      event = json.loads(line)
      events.append(event | {"step": int(event["step"]), "event": str(event["event"])})
    except (ValueError, TypeError, KeyError):
      raise UserError(
        f"{path} is damaged: line {number} is no event; delete that line, or the file"
      ) from None
  return events
