"""Draw the small charts of routing health and optimisation over time."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from moe_jax.analysis import svg
from moe_jax.analysis.run_folder import Run, Series
from moe_jax.analysis.text import MISSING, compact, significant

LAYER_STYLES = ("c1", "c2", "c3", "c4", "c6", "c5")


@dataclasses.dataclass(frozen=True)
class Stroke:
  """One line of a panel."""

  series: Series
  style: str


@dataclasses.dataclass(frozen=True)
class Panel:
  """One small chart: its title, its meaning (HTML-free), its lines, and the value it ends at."""

  title: str
  meaning: str
  strokes: tuple[Stroke, ...]
  last: str


def layer_style(layers: Sequence[int], layer: int) -> str:
  """Gives each of a few layers its own colour; many layers share a faint one."""
  if len(layers) > len(LAYER_STYLES):
    return "c0 faint"
  return LAYER_STYLES[list(layers).index(layer)]


def routing_panels(run: Run) -> list[Panel]:
  """Describes the routing metrics of an MoE run, one line for each layer."""
  panels = [
    _violation_panel(run),
    _entropy_panel(run),
    _layered_panel(
      run,
      "dropped_fraction",
      "Dropped assignments",
      "Share of (token, choice) assignments that found no slot in their expert.",
    ),
    _layered_panel(
      run, "dead_experts", "Dead experts", "Experts that took no token in the logged step."
    ),
    _layered_panel(
      run,
      "router_confidence",
      "Router confidence",
      "How sure the router is of its choice; 1 is certain.",
    ),
  ]
  return [panel for panel in panels if panel.strokes]


def optimisation_panels(run: Run) -> list[Panel]:
  """Describes losses beside the language model's, the optimiser and the speed."""
  described = (
    (
      "aux_loss",
      "Balance loss",
      "Auxiliary load-balancing loss as logged, apart from the language model's.",
    ),
    (
      "z_loss",
      "Router z-loss",
      "Keeps router logits small: mean of (ln Σ exp logits)², as logged.",
    ),
    ("grad_norm", "Gradient norm", "Global L2 norm of the gradient."),
    ("learning_rate", "Learning rate", "The schedule's value at each step."),
    ("tokens_per_second", "Speed", "Training tokens per second."),
  )
  panels = []
  for key, title, meaning in described:
    series = run.series(key)
    if series:
      panels.append(Panel(title, meaning, (Stroke(series, "c1"),), _short(series.last)))
  return panels


def draw_panel(panel: Panel, last_step: int) -> str:
  """Draws a panel as an <svg>."""
  values = np.concatenate([stroke.series.values for stroke in panel.strokes])
  values = values[np.isfinite(values)]
  # All these metrics are magnitudes: an axis from 0 keeps noise from looking like a trend.
  y_range = (0.0, _top(float(values.max())) if values.size else 1.0)
  if values.size and values.min() < 0:
    y_range = svg.padded_range(values)
  frame = svg.Frame(340, 190, 46, 20, 8, 36, (0.0, max(float(last_step), 1.0)), y_range)
  body = svg.axes(frame, x_label="step", x_ticks=4, y_ticks=4)
  body += "".join(
    svg.line(frame, stroke.series.steps, stroke.series.values, stroke.style)
    for stroke in panel.strokes
  )
  return svg.document(frame, body, f"{panel.title} against training step")


def load_entropy(load: np.ndarray) -> np.ndarray:
  """Returns (N,) entropies of (N, E) loads divided by log E: 1 is even, 0 is one expert only."""
  num_experts = load.shape[1]
  if num_experts == 1:
    return np.ones(len(load))
  logs = np.log(np.where(load > 0, load, 1.0))
  return -(load * logs).sum(axis=1) / math.log(num_experts)


def _violation_panel(run: Run) -> Panel:
  panel = _layered_panel(
    run,
    "max_violation",
    "Max violation",
    "Busiest expert's load over the even load, minus 1: max(load) · E − 1; 0 is balance. "
    "Dashed: what sampling noise alone gives.",
  )
  floors = [
    Stroke(series, "c0 dashed thin")
    for layer in run.layers
    if (series := run.series(f"moe/layer_{layer}/max_violation_floor"))
  ]
  return dataclasses.replace(panel, strokes=(*floors, *panel.strokes))


def _entropy_panel(run: Run) -> Panel:
  strokes, ends = [], []
  for layer in run.layers:
    steps, load = run.load(layer)
    if len(load):
      series = Series(steps, load_entropy(load))
      strokes.append(Stroke(series, layer_style(run.layers, layer)))
      ends.append(series.last)
  meaning = "Entropy of the load over log E; 1 is even, 0 is one expert taking all."
  return Panel("Load entropy", meaning, tuple(strokes), _ends(ends))


def _layered_panel(run: Run, name: str, title: str, meaning: str) -> Panel:
  """Takes one line for each layer, or the run's own line where layers are not logged."""
  strokes = [
    Stroke(series, layer_style(run.layers, layer))
    for layer in run.layers
    if (series := run.series(f"moe/layer_{layer}/{name}"))
  ]
  overall = run.series(f"moe/{name}")
  if overall and (not strokes or len(strokes) > len(LAYER_STYLES)):
    strokes.append(Stroke(overall, "c1"))
    return Panel(title, meaning, tuple(strokes), _short(overall.last))
  return Panel(title, meaning, tuple(strokes), _ends([stroke.series.last for stroke in strokes]))


def _ends(values: Sequence[float | None]) -> str:
  """Writes the last values of a few layers one by one, of many as a range."""
  known = [value for value in values if value is not None]
  if not known:
    return MISSING
  if len(known) > 3:
    return f"{_short(min(known))} to {_short(max(known))}"
  return " · ".join(_short(value) for value in known)


def _short(value: float | None) -> str:
  return compact(value) if value is not None and abs(value) >= 1000 else significant(value, 3)


def _top(largest: float) -> float:
  return largest * 1.06 if largest > 0 else 1.0
