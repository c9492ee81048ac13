"""One picture of a run as its folder tells it at this moment, for the terminal."""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.panel
import rich.table
import rich.text

from moe_jax.analysis.text import compact, duration, finite, fixed, percent
from moe_jax.errors import UserError
from moe_jax.training.events import read_events
from moe_jax.training.goodput import in_words, read_goodput
from moe_jax.training.run_folder import METRICS_FILE, SUMMARY_FILE, is_claimed, read_config

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60
_LAST_EVENTS = 5
_LAYERS = 8
_EXPERTS = 64
_HOTTEST = 2.0  # times the even share: as high as bars get
_MANY = 20


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """What the folder of a run holds at one moment.

  Attributes:
    workdir: the folder.
    steps: of the whole run.
    rows: of metrics.jsonl, those that can be read.
    events: see `moe_jax.training.events`.
    account: see `moe_jax.training.goodput`; None without one.
    status: running, finished, or not running.
    age: seconds since the last row; None without one.
  """

  workdir: Path
  steps: int
  rows: tuple[dict[str, Any], ...]
  events: tuple[dict[str, Any], ...]
  account: dict[str, Any] | None
  status: str
  age: float | None


def read_snapshot(workdir: Path) -> Snapshot:
  """Reads a run folder, whatever state its run is in.

  Raises:
    UserError: it is no run folder, or a file in it is damaged.
  """
  config = read_config(workdir)
  path = workdir / METRICS_FILE
  rows = _readable(path) if path.exists() else []
  if (workdir / SUMMARY_FILE).exists():
    status = "finished"
  else:
    status = "running" if is_claimed(workdir) else "not running"
  try:
    steps = int(config["steps"])
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f"{workdir / 'config.json'} tells no number of steps ({error})") from error
  return Snapshot(
    workdir,
    steps,
    tuple(rows),
    tuple(read_events(workdir)),
    read_goodput(workdir),
    status,
    time.time() - os.path.getmtime(path) if rows else None,
  )


def picture(snapshot: Snapshot) -> rich.panel.Panel:
  """Returns the picture: loss, load of experts, drops, speed, time left, last events."""
  table = rich.table.Table.grid(padding=(0, 2))
  table.add_column(style="bold", no_wrap=True)
  table.add_column(overflow="fold")
  for name, value in [*_progress(snapshot), *_losses(snapshot), *_experts(snapshot)]:
    table.add_row(name, value)
  if snapshot.account is not None:
    table.add_row("goodput", in_words(snapshot.account))
  for event in snapshot.events[-_LAST_EVENTS:]:
    told = time.strftime("%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
    table.add_row("event", f"{told}  {event.get('text', event['event'])}")
  return rich.panel.Panel(table, title=f"{snapshot.workdir.name}: {snapshot.status}")


def sparkline(values: Sequence[float | None], width: int = _WIDTH) -> str:
  """Returns a line of bars, lowest to highest value; a gap where nothing is finite.

  Where there are more values than places, a place shows their mean. Of twenty places and more, the
  highest tenth are full: the first losses of a run would flatten all others.
  """
  count = min(width, len(values))
  cells = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
  means = [_mean([v for v in cell if finite(v)]) for cell in cells]
  known = [mean for mean in means if mean is not None]
  if not known:
    return ""
  ranked = sorted(known)
  high = ranked[len(ranked) * 9 // 10] if len(ranked) >= _MANY else ranked[-1]
  low, span = ranked[0], (high - ranked[0]) or 1.0
  return "".join(
    " " if mean is None else _BARS[min(7, int(8 * (mean - low) / span))] for mean in means
  )


def heat_strip(load: Sequence[float]) -> rich.text.Text:
  """Returns a bar an expert, half high for an even share; dead experts are red, hot ones yellow."""
  strip = rich.text.Text()
  ratios = [share * len(load) if finite(share) else 0.0 for share in load]
  for ratio in ratios[:_EXPERTS]:
    mark = "x" if ratio == 0 else _BARS[min(7, int(8 * ratio / _HOTTEST))]
    strip.append(mark, "red" if ratio == 0 else "yellow" if ratio >= _HOTTEST else "")
  if len(load) > _EXPERTS:
    strip.append(f" and {len(load) - _EXPERTS} more")
  return strip.append(f"  the fullest {fixed(max(ratios), 2)} times the even share")


def _progress(snapshot: Snapshot) -> list[tuple[str, Any]]:
  if not snapshot.rows:
    return [("step", f"none of {snapshot.steps:,} logged yet")]
  last = snapshot.rows[-1]
  parts = [f"{last['step']:,} of {snapshot.steps:,} ({percent(last['step'] / snapshot.steps)})"]
  speed = last.get("tokens_per_second")
  if finite(speed) and speed:
    parts.append(f"{compact(speed)} tokens/s")
    left = (snapshot.steps - last["step"]) * last["tokens"] / last["step"] / speed
    if snapshot.status == "running":
      parts.append(f"{duration(left)} left")
  if snapshot.status != "finished":
    parts.append(f"last row {duration(snapshot.age)} ago")
  return [("step", "   ".join(parts))]


def _losses(snapshot: Snapshot) -> list[tuple[str, Any]]:
  lines = []
  for name, key in (("loss", "loss"), ("held-out", "eval_loss")):
    values = [row[key] for row in snapshot.rows if key in row]
    known = [value for value in values if finite(value)]
    if known:
      lines.append((name, f"{sparkline(values)}  {fixed(known[-1], 3)}"))
  return lines


def _experts(snapshot: Snapshot) -> list[tuple[str, Any]]:
  if not snapshot.rows:
    return []
  last, lines = snapshot.rows[-1], []
  loads = [(k, v) for k, v in last.items() if k.endswith("/load") and isinstance(v, list)]
  for name, load in loads[:_LAYERS]:
    lines.append((name.removeprefix("moe/").removesuffix("/load").replace("_", " "), load))
  drawn = [(name, heat_strip(load)) for name, load in lines]
  if len(loads) > _LAYERS:
    drawn.append(("", f"and {len(loads) - _LAYERS} layers more"))
  if finite(last.get("moe/dropped_fraction")):
    drops = [row.get("moe/dropped_fraction") for row in snapshot.rows]
    drawn.append(("dropped", f"{sparkline(drops)}  {percent(drops[-1])}"))
  return drawn


def _mean(values: Sequence[float]) -> float | None:
  return sum(values) / len(values) if values else None


def _readable(path: Path) -> list[dict[str, Any]]:
  """Returns the rows up to the first line that is being written, or is none."""
  rows = []
  for line in path.read_bytes().splitlines(keepends=True):
    try:
      row = json.loads(line)
      rows.append(row | {"step": int(row["step"]), "tokens": int(row.get("tokens", 0))})
    except (ValueError, TypeError, KeyError):
      break
  return rows
