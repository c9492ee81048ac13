"""Write the section of the report on where the time of a run went, and what happened in it."""

import json
from pathlib import Path
from typing import Any

from moe_jax.analysis import sections
from moe_jax.analysis.text import duration, escape, percent
from moe_jax.errors import UserError

_SHOWN = 20
_MEANINGS = {
  "init": "before the first step",
  "compile": "compiling it",
  "data": "waiting for batches",
  "step": "steps that count",
  "checkpoint": "waiting for saves",
  "evaluation": "held-out text",
  "lost": "steps that were trained again",
  "down": "between two starts",
}


def section(workdir: Path) -> str:
  """Writes the table of seconds, and the events.

  Raises:
    UserError: goodput.json or events.jsonl is damaged.
  """
  path = workdir / "goodput.json"
  if not path.exists():
    return sections.section("time", "Time", sections.missing("The run kept no goodput.json."))
  account = _read(path)
  seconds = account["seconds"]
  whole = sum(seconds.values()) or 1.0
  rows = "".join(
    f"<tr><td>{escape(name)}</td><td>{escape(_MEANINGS[name])}</td>"
    f"<td>{escape(duration(value))}</td><td>{percent(value / whole)}</td></tr>"
    for name, value in seconds.items()
  )
  starts = account["starts"]
  return sections.section(
    "time",
    "Time",
    f"<table><tr><th></th><th></th><th>time</th><th>share</th></tr>{rows}</table>",
    sections.caption(
      f"Goodput {percent(account['goodput'])} over {starts} start{'s' if starts != 1 else ''}:",
      "the share of the time in which steps were trained that counted.",
    ),
    _events(workdir),
  )


def _read(path: Path) -> dict[str, Any]:
  """Returns the account that the last start wrote."""
  try:
    account = json.loads(path.read_bytes())
    seconds = {name: float(account["seconds"][name]) for name in _MEANINGS}
    goodput, starts = float(account["goodput"]), len(account["starts"])
    return {"seconds": seconds, "goodput": goodput, "starts": starts}
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(
      f"{path} is damaged ({error}); delete it: it only tells where time has gone"
    ) from error


def _events(workdir: Path) -> str:
  path = workdir / "events.jsonl"
  lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  try:
    # A kill may have cut the last one short.
    events = [json.loads(line) for line in lines if line.endswith(b"\n")]
    texts = [str(event["text"]) for event in events if event["event"] != "started"]
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(f"{path} is damaged ({error}); mend it, or delete it") from error
  if not texts:
    return ""
  items = "".join(f"<li>{escape(text)}</li>" for text in texts[-_SHOWN:])
  return f"<h3>Events <small>the last of {len(texts)}</small></h3><ul>{items}</ul>"
