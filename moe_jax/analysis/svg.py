"""Draw line charts as inline SVG whose colours come from the page, so that they follow its theme.

Colours are CSS classes: `c0` is the ink of references, `c1` to `c7` the colour-blind-safe palette
of report.css.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from moe_jax.analysis.text import escape, fixed, significant

_MAX_POINTS = 700  # about one for each pixel; more cannot be seen and swell the page


@dataclasses.dataclass(frozen=True)
class Frame:
  """The plot area in pixels and the data ranges it shows."""

  width: int
  height: int
  left: int
  right: int
  top: int
  bottom: int
  x_range: tuple[float, float]
  y_range: tuple[float, float]

  def x(self, value):
    """Maps data x (scalar or array) to pixels."""
    low, high = self.x_range
    return self.left + (value - low) / (high - low) * self.plot_width

  def y(self, value):
    """Maps data y (scalar or array) to pixels, upwards."""
    low, high = self.y_range
    return self.top + (high - value) / (high - low) * self.plot_height

  @property
  def plot_width(self) -> int:
    """Pixels between the left and the right axis."""
    return self.width - self.left - self.right

  @property
  def plot_height(self) -> int:
    """Pixels between the top and the bottom axis."""
    return self.height - self.top - self.bottom


def padded_range(values: Sequence[float], *, floor: float | None = None) -> tuple[float, float]:
  """Returns a range a little wider than the finite values, never empty, not below `floor`."""
  values = np.asarray(values, np.float64)
  values = values[np.isfinite(values)]
  if not values.size:
    return 0.0, 1.0
  low, high = float(values.min()), float(values.max())
  pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
  low, high = low - pad, high + pad
  return (low if floor is None else max(low, floor)), high


def nice_ticks(low: float, high: float, count: int) -> tuple[list[float], float]:
  """Returns about `count` round numbers within [low, high], and their distance."""
  rough = (high - low) / max(count, 1)
  power = 10.0 ** math.floor(math.log10(rough))
  step = power * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * power >= rough * (1 - 1e-9))
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [index * step for index in range(first, last + 1)], step


def tick_label(value: float, step: float) -> str:
  """Writes a tick with just the decimals its distance needs."""
  if value == 0:
    return "0"
  for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= max(unit, 10_000) and step >= unit / 1000:
      return f"{value / unit:g} {suffix}"
  if step < 1e-3:
    return significant(value, 2)
  decimals = max(0, -math.floor(math.log10(step) + 1e-9))
  has_half_step = abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6
  return fixed(value, decimals + has_half_step)


def axes(frame: Frame, *, x_label: str, x_ticks: int = 6, y_ticks: int = 5) -> str:
  """Draws grid, tick labels and the x axis' name."""
  parts = []
  ticks, step = nice_ticks(*frame.y_range, y_ticks)
  for tick in ticks:
    y = frame.y(tick)
    parts.append(_grid_line(frame.left, frame.width - frame.right, y))
    parts.append(text(frame.left - 7, y + 4, tick_label(tick, step), "tick end"))
  bottom = frame.height - frame.bottom
  ticks, step = nice_ticks(*frame.x_range, x_ticks)
  for tick in ticks:
    if step >= 1 or tick == int(tick):
      x = frame.x(tick)
      parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
      parts.append(text(x, bottom + 17, tick_label(tick, step), "tick mid"))
  parts.append(f'<path class="axis" d="M{frame.left} {bottom}h{frame.plot_width}"/>')
  middle = frame.left + frame.plot_width / 2
  parts.append(text(middle, frame.height - 3, x_label, "name mid"))
  return "".join(parts)


def right_axis(frame: Frame, factor: float, ticks: int = 5) -> str:
  """Draws a second y scale on the right: the left one times `factor`."""
  low, high = (bound * factor for bound in frame.y_range)
  values, step = nice_ticks(low, high, ticks)
  x = frame.width - frame.right
  return "".join(
    f'<path class="axis" d="M{x} {frame.y(value / factor):.1f}h4"/>'
    + text(x + 8, frame.y(value / factor) + 4, tick_label(value, step), "tick")
    for value in values
  )


def line(frame: Frame, x: np.ndarray, y: np.ndarray, style: str, *, marks: bool = False) -> str:
  """Draws a polyline, broken where y is not finite; a point with no neighbour becomes a dot.

  Args:
    frame: where to draw.
    x: (N,) data, increasing.
    y: (N,) data.
    style: CSS classes of the stroke.
    marks: also draw a dot at each point.
  """
  x, y = thin(np.asarray(x, np.float64), np.asarray(y, np.float64))
  path, dots = [], []
  for start, stop in finite_stretches(y):
    points = _points(frame, x[start:stop], y[start:stop])
    if len(points) > 1:
      path.append("M" + "L".join(points))
    if marks or len(points) == 1:
      dots += points
  drawn = f'<path class="line {style}" d="{"".join(path)}"/>' if path else ""
  return drawn + "".join(_dot(point, style) for point in dots)


def band(frame: Frame, x: np.ndarray, low: np.ndarray, high: np.ndarray, style: str) -> str:
  """Fills between two curves, over the points where both are finite."""
  kept = np.isfinite(low) & np.isfinite(high)
  points = _points(frame, x[kept], high[kept]) + _points(frame, x[kept], low[kept])[::-1]
  return f'<path class="band {style}" d="M{"L".join(points)}Z"/>' if points else ""


def rule(
  frame: Frame, y: float, label: str, style: str, *, at_right: bool = False, below: bool = False
) -> str:
  """Draws a horizontal line across the plot with its name at one end, above or below it."""
  height = frame.y(y)
  x = frame.width - frame.right - 8 if at_right else frame.left + 8
  named = text(x, height + (15 if below else -6), label, f"label {style}" + " end" * at_right)
  return f'<path class="line {style}" d="M{frame.left} {height:.1f}h{frame.plot_width}"/>{named}'


def text(x: float, y: float, content: str, style: str) -> str:
  """Places a line of text; `content` is escaped here."""
  return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def document(frame: Frame, body: str, description: str) -> str:
  """Wraps drawn parts into an <svg> that scales with the page and has a name to be read aloud."""
  return (
    f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" '
    f'aria-label="{escape(description)}">{body}</svg>'
  )


def clipped(frame: Frame, identifier: str, body: str) -> str:
  """Hides what lies outside the plot area; `identifier` must be unique in the page."""
  # Two pixels of margin keep the dots and strokes that sit on the border whole.
  return (
    f'<clipPath id="{identifier}"><rect x="{frame.left - 2}" y="{frame.top - 2}" '
    f'width="{frame.plot_width + 4}" height="{frame.plot_height + 4}"/></clipPath>'
    f'<g clip-path="url(#{identifier})">{body}</g>'
  )


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Keeps the lowest and highest point of each of some hundred stretches, so no spike is lost."""
  if len(x) <= _MAX_POINTS:
    return x, y
  kept = []
  for part in np.array_split(np.arange(len(x)), _MAX_POINTS // 2):
    broken = part[~np.isfinite(y[part])]
    if broken.size == part.size:
      kept.append(part[:1])
      continue
    kept.append(np.array([part[np.nanargmin(y[part])], part[np.nanargmax(y[part])], *broken[:1]]))
  indices = np.unique(np.concatenate(kept))
  return x[indices], y[indices]


def finite_stretches(y: np.ndarray) -> list[tuple[int, int]]:
  """Returns the (start, stop) of each unbroken run of finite values."""
  good = np.concatenate([[False], np.isfinite(y), [False]])
  edges = np.flatnonzero(good[1:] != good[:-1])
  return list(zip(edges[::2], edges[1::2], strict=True))


def _points(frame: Frame, x: np.ndarray, y: np.ndarray) -> list[str]:
  # Far outside the frame the exact place does not matter, and huge coordinates break renderers.
  pixels = np.clip(frame.y(y), -2 * frame.height, 3 * frame.height)
  return [f"{a:.1f} {b:.1f}" for a, b in zip(frame.x(x), pixels, strict=True)]


def _dot(point: str, style: str) -> str:
  x, y = point.split()
  return f'<circle class="dot {style}" cx="{x}" cy="{y}" r="2.6"/>'


def _grid_line(left: float, right: float, y: float) -> str:
  return f'<path class="grid" d="M{left} {y:.1f}H{right}"/>'
