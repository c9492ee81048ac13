"""Draw the loss curves: training, held-out, the dense baseline, other runs, compressors."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_jax.analysis import svg
from moe_jax.analysis.run_folder import Baseline, Run, Series
from moe_jax.analysis.text import fixed

_EARLY = 0.08  # the share of the run whose steep start may leave the frame
_SMOOTHING = 0.03  # the smoothing window as a share of the logged rows
_COMPARED_STYLES = ("c7", "c5", "c7 dashed", "c5 dashed", "c7 dotted", "c5 dotted")


@dataclasses.dataclass(frozen=True)
class Curve:
  """A curve of the figure: what to draw, how, and how the legend calls it."""

  label: str
  series: Series
  style: str
  marks: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
  """A horizontal line at `value` nats per token."""

  label: str
  value: float
  style: str


@dataclasses.dataclass(frozen=True)
class LossFigure:
  """The picture, its legend as (style, label) pairs, and what the caption must add."""

  image: str
  legend: tuple[tuple[str, str], ...]
  remarks: tuple[str, ...]


def draw_loss(run: Run, baseline: Baseline | None, others: Sequence[tuple[str, Run]]) -> LossFigure:
  """Draws every loss of the run in nats per token, with bits per byte on the right axis.

  Args:
    run: the run reported.
    baseline: held-out curve of a baseline, or None.
    others: (label, run) pairs whose held-out curves are laid over.
  """
  train = run.series("loss")
  window = round(_SMOOTHING * len(train.values)) | 1  # odd, so that it has a centre
  smooth = Series(train.steps, smoothed(train.values, window))
  curves = _curves(run, smooth, others)
  if baseline is not None:
    baseline = _cut_at(baseline, run.last_step)
  rules = compressor_rules(run)
  frame, hidden = _frame(run, curves, baseline, rules)
  body = svg.axes(frame, x_label="step", x_ticks=8, y_ticks=6) + _units(frame, run)
  body += svg.clipped(frame, "loss-frame", _drawn(frame, train, curves, baseline))
  body += _drawn_rules(frame, rules, curves)
  legend = [(curve.style, _with_last(curve.label, curve.series.last)) for curve in curves]
  if baseline is not None:
    mean = Series(baseline.steps, baseline.mean)
    legend.append(("c0 dashed", _with_last(baseline.name, mean.last)))
  image = svg.document(frame, body, "Loss in nats per token against training step")
  return LossFigure(image, tuple(legend), _remarks(train, window, hidden))


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
  """Averages each value with its neighbours in `window` (odd) rows; NaNs stay and add nothing."""
  good = np.isfinite(values)
  half = window // 2
  sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
  counts = np.concatenate([[0], np.cumsum(good)])
  index = np.arange(len(values))
  # At the start the window shrinks on both sides, so that the steep fall is not flattened.
  reach = np.minimum(half, index)
  first, stop = index - reach, np.minimum(index + reach + 1, len(values))
  number = counts[stop] - counts[first]
  mean = (sums[stop] - sums[first]) / np.maximum(number, 1)
  return np.where(good, mean, np.nan)


def compressor_rules(run: Run) -> tuple[Rule, ...]:
  """Converts the compressors' bits per byte to nats per token; empty where the ratio is unknown."""
  factor = run.bits_per_byte_per_nat
  if not factor:
    return ()
  names = (
    ("xz", "xz\u00a0-9", "c3"),
    ("xz_primed", "xz\u00a0-9 primed with the training text", "c4"),
  )
  found = ((run.result(f"compressors.{key}"), label, style) for key, label, style in names)
  return tuple(
    Rule(f"{label}: {fixed(bits, 3)} bits/byte", bits / factor, style)
    for bits, label, style in found
    if bits
  )


def _curves(run: Run, smooth: Series, others: Sequence[tuple[str, Run]]) -> list[Curve]:
  curves = [
    Curve("training", smooth, "c1"),
    Curve("held-out", run.series("eval_loss"), "c2 thick", marks=True),
    Curve("held-out at training capacity", run.series("eval_loss_at_capacity"), "c6 dotted"),
  ]
  for index, (label, other) in enumerate(others):
    style = _COMPARED_STYLES[index % len(_COMPARED_STYLES)]
    curves.append(Curve(f"{label} (held-out)", _in_units_of(run, other), style))
  return [curve for curve in curves if curve.series]


def _in_units_of(run: Run, other: Run) -> Series:
  """Returns the other run's held-out loss in nats per token of `run`'s tokenizer.

  Bits per byte are common to all tokenizers, so the conversion goes through them; without them the
  loss is taken as it is.
  """
  series = other.series("eval_loss")
  mine, theirs = run.bits_per_byte_per_nat, other.bits_per_byte_per_nat
  if not mine or not theirs:
    return series
  return Series(series.steps, series.values * theirs / mine)


def _cut_at(baseline: Baseline, last_step: int) -> Baseline:
  kept = baseline.steps <= last_step
  parts = {name: getattr(baseline, name)[kept] for name in ("steps", "mean", "deviation")}
  return dataclasses.replace(baseline, **parts)


def _frame(
  run: Run, curves: Sequence[Curve], baseline: Baseline | None, rules: Sequence[Rule]
) -> tuple[svg.Frame, int | None]:
  """Chooses the ranges; also returns the step before which the training curve lies above them."""
  last = max([run.last_step, *(int(curve.series.steps[-1]) for curve in curves)])
  early = run.rows[0]["step"] + _EARLY * (last - run.rows[0]["step"])
  shown = [rule.value for rule in rules]
  for curve in curves:
    shown += curve.series.values[curve.series.steps >= early].tolist()
  if baseline is not None:
    shown += (baseline.mean + baseline.deviation)[baseline.steps >= early].tolist()
  y_range = svg.padded_range(shown, floor=0.0)
  x_range = (0.0, max(float(last), 1.0))
  training = next((curve.series for curve in curves if curve.label == "training"), None)
  hidden = None
  if training is not None:
    above = np.flatnonzero(training.values > y_range[1])
    hidden = int(training.steps[above[-1]]) if above.size else None
  return svg.Frame(860, 400, 52, 56, 26, 40, x_range, y_range), hidden


def _units(frame: svg.Frame, run: Run) -> str:
  parts = svg.text(4, 13, "nats per token", "name")
  factor = run.bits_per_byte_per_nat
  if factor:
    parts += svg.right_axis(frame, factor, 6)
    parts += svg.text(frame.width - 2, 13, "bits per byte", "name end")
  return parts


def _drawn(
  frame: svg.Frame, train: Series, curves: Sequence[Curve], baseline: Baseline | None
) -> str:
  parts = [svg.line(frame, train.steps, train.values, "c1 faint")]
  if baseline is not None:
    low, high = baseline.mean - baseline.deviation, baseline.mean + baseline.deviation
    parts.append(svg.band(frame, baseline.steps, low, high, "c0"))
    parts.append(svg.line(frame, baseline.steps, baseline.mean, "c0 dashed"))
  for curve in curves:
    marks = curve.marks and len(curve.series.steps) <= 60
    parts.append(svg.line(frame, curve.series.steps, curve.series.values, curve.style, marks=marks))
  return "".join(parts)


def _drawn_rules(frame: svg.Frame, rules: Sequence[Rule], curves: Sequence[Curve]) -> str:
  """Draws the compressors' lines; of two that are close, the lower one is labelled below."""
  heights = [frame.y(rule.value) for rule in rules]
  close = len(rules) == 2 and abs(heights[0] - heights[1]) < 20
  parts = []
  for index, rule in enumerate(rules):
    below = close and index == int(np.argmax(heights))
    at_right = _has_room_at_right(frame, heights[index] + (10 if below else -10), curves)
    style = f"{rule.style} thin"
    parts.append(svg.rule(frame, rule.value, rule.label, style, at_right=at_right, below=below))
  return "".join(parts)


def _has_room_at_right(frame: svg.Frame, height: float, curves: Sequence[Curve]) -> bool:
  """Tells whether a label at `height` pixels keeps further from the curves in the right half."""
  middle = sum(frame.x_range) / 2
  distance = {True: float(frame.height), False: float(frame.height)}
  for curve in curves:
    gaps = np.abs(frame.y(curve.series.values) - height)
    for at_right, nearest in distance.items():
      there = gaps[((curve.series.steps > middle) == at_right) & np.isfinite(gaps)]
      distance[at_right] = min([nearest, *there.tolist()])
  return distance[True] >= distance[False]


def _with_last(label: str, value: float | None) -> str:
  return f"{label} {fixed(value, 3)}" if value is not None else label


def _remarks(train: Series, window: int, hidden: int | None) -> tuple[str, ...]:
  remarks = []
  if window > 1:
    remarks.append(f"The bold training line is a centred mean of {window} logged rows.")
  if hidden is not None:
    first = train.values[np.isfinite(train.values)][0]
    remarks.append(
      f"Up to step {hidden:,} training lies above the frame (it starts at {fixed(first, 2)})."
    )
  return tuple(remarks)
