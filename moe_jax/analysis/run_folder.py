"""Read what a run left in its folder: config.json, metrics.jsonl, summary.json, the baseline."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.analysis.text import finite
from moe_jax.errors import UserError

_LAYER_KEY = re.compile(r"moe/layer_(\d+)/")
_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Series:
  """One metric over the run: `steps` (N,) int64, `values` (N,) float64, NaN where not finite."""

  steps: np.ndarray
  values: np.ndarray

  @property
  def last(self) -> float | None:
    """The last finite value, or None."""
    kept = self.values[np.isfinite(self.values)]
    return float(kept[-1]) if kept.size else None

  def __bool__(self) -> bool:
    """Tells whether there is anything to draw."""
    return bool(np.isfinite(self.values).any())


@dataclasses.dataclass(frozen=True)
class Run:
  """One run as its folder tells it; `config` and `summary` are None where the file is missing."""

  path: Path
  config: dict | None
  summary: dict | None
  rows: tuple[dict, ...]
  truncated: bool

  @property
  def name(self) -> str:
    """The folder's name."""
    return self.path.name

  def series(self, key: str) -> Series:
    """Collects the rows that hold `key`; empty where none does."""
    held = [(row["step"], row[key]) for row in self.rows if key in row]
    values = [value if finite(value) else np.nan for _, value in held]
    return Series(np.array([step for step, _ in held], np.int64), np.array(values, np.float64))

  def load(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Collects a layer's load: steps (N,) int64, shares (N, E) float64 (each row sums to 1)."""
    key = f"moe/layer_{layer}/load"
    held = [
      (row["step"], row[key]) for row in self.rows if isinstance(row.get(key), list) and row[key]
    ]
    if len({len(load) for _, load in held}) > 1:
      raise UserError(
        f"{self.path / 'metrics.jsonl'}: {key} changes its number of experts, "
        "expected the same on every line"
      )
    shares = [[value if finite(value) else np.nan for value in load] for _, load in held]
    return np.array([step for step, _ in held], np.int64), np.array(shares, np.float64)

  @functools.cached_property
  def layers(self) -> tuple[int, ...]:
    """The MoE layers' places in the stack, in order; empty for a dense run."""
    found = {match[1] for row in self.rows for key in row if (match := _LAYER_KEY.match(key))}
    return tuple(sorted(int(index) for index in found))

  @property
  def last_step(self) -> int:
    """The last step that was logged."""
    return self.rows[-1]["step"]

  def setting(self, path: str) -> Any:
    """Looks up a dotted path in the config; None where it is missing."""
    return dig(self.config, path)

  def result(self, path: str) -> Any:
    """Looks up a dotted path in the summary; None where it is missing."""
    return dig(self.summary, path)

  def evaluated(self, name: str) -> float | None:
    """Returns a held-out result: the summary's, else the last logged `eval_<name>`."""
    value = self.result(f"eval.{name}")
    return value if finite(value) else self.series(f"eval_{name}").last

  @property
  def bits_per_byte_per_nat(self) -> float | None:
    """Bits per byte for one nat per token on the held-out text: tokens / bytes / ln 2."""
    bits, nats = self.evaluated("bits_per_byte"), self.evaluated("loss")
    return bits / nats if bits and nats else None


@dataclasses.dataclass(frozen=True)
class Baseline:
  """A held-out curve to compare with: mean and standard deviation over `seeds` runs."""

  name: str
  seeds: int | None
  note: str
  steps: np.ndarray
  mean: np.ndarray
  deviation: np.ndarray


def read_run(workdir: str | Path) -> Run:
  """Reads a run folder; only metrics.jsonl must be there.

  A last line that a killed run left incomplete is dropped and marked by `truncated`.

  Raises:
    UserError: there is no metrics.jsonl with a complete line, or a file in the folder is damaged.
  """
  path = Path(workdir).resolve()
  rows, truncated = _read_metrics(path / "metrics.jsonl")
  config, summary = (_read_object(path / name) for name in ("config.json", "summary.json"))
  return Run(path, config, summary, rows, truncated)


def baseline_path(run: Run) -> Path | None:
  """Finds the file `config.report.baseline` names; None where it names none.

  A relative path is looked up in the repository, then in the current directory.
  """
  named = run.setting("report.baseline")
  if not named:
    return None
  in_repository = _REPOSITORY / named
  return in_repository if in_repository.exists() else Path(named).absolute()


def read_baseline(path: Path) -> Baseline | None:
  """Reads a baseline curve; None where the file does not exist.

  Raises:
    UserError: the file is not a baseline.
  """
  content = _read_object(path)
  if content is None:
    return None
  try:
    points = np.array(content["points"], np.float64).reshape(-1, 3)
  except (KeyError, TypeError, ValueError):
    raise UserError(
      f"{path} is not a baseline, expected `points` as a list of [step, mean loss, deviation]"
    ) from None
  return Baseline(
    str(content.get("name", path.stem)),
    content.get("seeds"),
    str(content.get("note", "")),
    *points.T,
  )


def dig(tree: Any, path: str) -> Any:
  """Follows a dotted path through nested mappings; None where it ends early."""
  for key in path.split("."):
    if not isinstance(tree, Mapping):
      return None
    tree = tree.get(key)
  return tree


def _read_object(path: Path) -> dict | None:
  if not path.is_file():
    return None
  try:
    content = json.loads(path.read_bytes())
  except ValueError as error:
    raise UserError(f"{path} is not valid JSON ({error}), expected one JSON object") from None
  if not isinstance(content, dict):
    raise UserError(f"{path} holds a {type(content).__name__}, expected one JSON object")
  return content


def _read_metrics(path: Path) -> tuple[tuple[dict, ...], bool]:
  if not path.is_file():
    raise UserError(
      f"{path.parent} is not a run folder: it holds no metrics.jsonl, "
      "expected the --workdir of a training run"
    )
  lines = [
    (number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()
  ]
  truncated = bool(lines) and _parse_row(lines[-1][1]) is None
  if truncated:
    lines.pop()
  if not lines:
    raise UserError(
      f"{path} holds no complete line, expected one JSON object for each logged step; let the run"
      " go on until it has logged one"
    )
  rows = []
  for number, line in lines:
    row = _parse_row(line)
    if row is None:
      raise UserError(
        f"{path} line {number} is {_excerpt(line)}, expected a JSON object with a whole `step`"
      )
    if rows and row["step"] <= rows[-1]["step"]:
      raise UserError(
        f"{path} line {number} is step {row['step']} after step {rows[-1]['step']}, "
        "expected each step once and in order"
      )
    rows.append(row)
  return tuple(rows), truncated


def _parse_row(line: bytes) -> dict | None:
  try:
    row = json.loads(line)
  except ValueError:
    return None
  is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
  return row if is_row else None


def _excerpt(line: bytes) -> str:
  text = line.decode("utf-8", "replace").strip()
  return repr(text if len(text) <= 40 else text[:40] + "…")
