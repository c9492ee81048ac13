"""Where metrics go: metrics.jsonl always, TensorBoard on request, the terminal."""

import importlib.util
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

from moe_jax.errors import UserError
from moe_jax.sharding.processes import is_first_process
from moe_jax.training.append_only import LineFile
from moe_jax.training.config import LogConfig
from moe_jax.training.run_folder import METRICS_FILE
from moe_jax.training.tracking import TrackerWriter, check_tracker

Row = dict[str, Any]


class JsonLinesWriter:
  """Appends one JSON object a step to metrics.jsonl; a step appears once.

  Opening it cuts the file behind the restored step: what a killed run wrote beyond its last
  checkpoint will be written again, the same.
  """

  def __init__(self, workdir: Path, restored_step: int):
    path = workdir / METRICS_FILE
    cut_after(path, restored_step)
    self._file = LineFile(path)

  def write(self, row: Row) -> None:
    """Writes one line and hands it to the operating system."""
    self._file.append(json.dumps(row, allow_nan=False) + "\n")

  def sync(self) -> None:
    """Returns when all lines are on disk: call it before a checkpoint that they precede."""
    self._file.sync()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def cut_after(path: Path, step: int) -> None:
  """Drops the rows beyond `step`, and a last line that a kill cut short."""
  if not path.exists():
    return
  kept = [line for _, line in rows_until(path, step)]
  LineFile(path, [line.decode() for line in kept]).close()


def check_rows(workdir: Path, restored_step: int, due: Iterable[int]) -> None:
  """Checks, without writing, that metrics.jsonl holds the rows that precede a checkpoint.

  Args:
    workdir: the run folder.
    restored_step: the step of the checkpoint.
    due: the steps up to it that a run logs.

  Raises:
    UserError: a row is missing or damaged; going on would leave a gap in the metrics.
  """
  path = workdir / METRICS_FILE
  held = {step for step, _ in rows_until(path, restored_step)} if path.exists() else set()
  lost = next((step for step in due if step not in held), None)
  if lost is not None:
    raise UserError(
      f"{path} lacks the row of step {lost}, and the checkpoint to go on from is of step"
      f" {restored_step}; delete the folders of {workdir / 'checkpoints'} from step {lost} on to"
      " train those steps again, or start in another workdir"
    )


def rows_until(path: Path, last: int) -> Iterator[tuple[int, bytes]]:
  """Yields (step, line) of the rows up to step `last`; ends at a line that a kill cut short."""
  for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
    if not line.endswith(b"\n"):
      return
    try:
      step = int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
      raise UserError(
        f"{path} is damaged: line {number} is no row of metrics; mend it, or start in another"
        " workdir"
      ) from None
    if step > last:
      return
    yield step, line


class TensorBoardWriter:
  """Writes the scalars of each row as TensorBoard events."""

  def __init__(self, workdir: Path, restored_step: int):
    import tensorboardX

    # Rows beyond the checkpoint are written again; purge_step hides the first ones.
    self._writer = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=restored_step + 1
    )

  def write(self, row: Row) -> None:
    """Writes every scalar of a row."""
    for name, value in row.items():
      if name != "step" and isinstance(value, int | float):
        self._writer.add_scalar(name, value, row["step"])

  def sync(self) -> None:
    """Flushes the events."""
    self._writer.flush()

  def close(self) -> None:
    """Closes the event file."""
    self._writer.close()


Writer = JsonLinesWriter | TensorBoardWriter | TrackerWriter


def open_writers(config: LogConfig, workdir: Path, restored_step: int) -> list[Writer]:
  """Opens metrics.jsonl, and what else the config asks for.

  Only the first process of a run writes: the others get none.
  """
  if not is_first_process():
    return []
  writers = [JsonLinesWriter(workdir, restored_step)]
  if config.tensorboard:
    writers.append(TensorBoardWriter(workdir, restored_step))
  for package, project in (("wandb", config.wandb), ("trackio", config.trackio)):
    if project:
      writers.append(TrackerWriter(package, project, workdir))
  return writers


def check_writers(config: LogConfig) -> None:
  """Raises UserError if a writer that the config asks for is not installed."""
  if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
    raise UserError(
      "config.log.tensorboard = True needs tensorboardX; pip install"
      " 'moe_jax[tensorboard]', or set it to False"
    )
  check_tracker("wandb", config.wandb)
  check_tracker("trackio", config.trackio)


class Progress:
  """Shows a run: a bar with ETA and losses on a terminal, one line every few seconds elsewhere.

  A quiet one shows nothing: one process of a run speaks for all.
  """

  _SECONDS_BETWEEN_LINES = 10.0

  def __init__(self, first_step: int, steps: int, title: str, *, quiet: bool = False):
    self._console = rich.console.Console(highlight=False, soft_wrap=True, quiet=quiet)
    self._steps, self._first = steps, first_step
    self._started = self._last_line = time.monotonic()
    self._bar = self._task = None
    if self._console.is_terminal and not quiet:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
        rich.progress.TextColumn("{task.fields[losses]}"),
        console=self._console,
      )
      self._task = self._bar.add_task(title, total=steps, completed=first_step, losses="")
      self._bar.start()

  def update(self, row: Row) -> None:
    """Shows a row of metrics."""
    text = _losses_text(row)
    if self._bar is not None:
      self._bar.update(self._task, completed=row["step"], losses=text)
      return
    now = time.monotonic()
    if now - self._last_line >= self._SECONDS_BETWEEN_LINES or "eval_loss" in row:
      self._last_line = now
      done = max(row["step"] - self._first, 1)
      left = (now - self._started) / done * (self._steps - row["step"])
      self.say(f"step {row['step']}/{self._steps}  {text}  {_clock(left)} left")

  def say(self, text: str) -> None:
    """Prints a line above the bar."""
    self._console.print(text, markup=False)
    sys.stdout.flush()

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.stop()


def _losses_text(row: Row) -> str:
  if row["loss"] is None:
    return "skipped: not finite"
  parts = [f"loss {row['loss']:.3f}"]
  if "aux_loss" in row:
    parts.append(f"aux {row['aux_loss']:.3f}")
    parts.append(f"dropped {100 * row['moe/dropped_fraction']:.1f}%")
  if "eval_loss" in row:
    parts.append(f"held-out {row['eval_loss']:.3f} ({row['eval_bits_per_byte']:.3f} bits/byte)")
  if row["tokens_per_second"] is not None:
    parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
  return "  ".join(parts)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  return f"{minutes}:{seconds:02d}"
