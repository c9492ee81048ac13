"""Figures of a recipe as SVG files that stand alone."""

from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.analysis import svg
from moe_jax.sweep.cards import Card, has_diverged

_COLORS = ("0072b2", "d55e00", "00805f", "b0558a", "3a9bd0", "b98000", "7a4fb5", "55585f")
_DASHES = ("", "6 4", "1.5 4")
_STYLE = """<style>
svg { background: #fff; font: 12.5px system-ui, "Liberation Sans", sans-serif; }
text { fill: #62666f; } .end { text-anchor: end; } .mid { text-anchor: middle; }
.grid { stroke: #ecebe6; fill: none; } .axis { stroke: #62666f; fill: none; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .band { opacity: 0.14; }
%s</style>"""
_LEGEND_WIDTH, _ROW = 230, 19
# The steep start of every curve is alike and would leave no room for what sets arms apart.
_SHOWN_FROM = 0.2


def draw_curves(cards: Mapping[str, Sequence[Card]]) -> str:
  """Draws the held-out loss of each arm over its steps: the mean over seeds, and their range.

  Arms of which a run diverged are left out; nothing is drawn of none.
  """
  complete = {arm: own for arm, own in cards.items() if not any(map(has_diverged, own))}
  curves = {arm: _curve(own) for arm, own in complete.items()}
  if not curves:
    return ""
  shown = [curve[1:, curve[0] >= _SHOWN_FROM * curve[0, -1]] for curve in curves.values()]
  y_range = svg.padded_range(np.concatenate([part.ravel() for part in shown]).tolist())
  last = max(float(curve[0, -1]) for curve in curves.values())
  height = max(360, 60 + _ROW * len(curves))
  frame = svg.Frame(860, height, 56, _LEGEND_WIDTH, 26, 40, (_SHOWN_FROM * last, last), y_range)
  lines = [
    svg.band(frame, steps, low, high, f"s{i}") + svg.line(frame, steps, mean, f"s{i}", marks=True)
    for i, (steps, mean, low, high) in enumerate(curves.values())
  ]
  body = svg.axes(frame, x_label="step") + svg.text(4, 13, "held-out, nats per token", "name")
  body += svg.clipped(frame, "frame", "".join(lines)) + _legend(frame, curves)
  picture = svg.document(frame, _style(len(curves)) + body, "Held-out loss of each arm")
  return picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _curve(cards: Sequence[Card]) -> np.ndarray:
  """Returns (4, evaluations): step, mean, least and greatest loss over seeds."""
  steps = np.array([point[0] for point in cards[0]["curve"]], np.float64)
  losses = np.array([[point[1] for point in card["curve"]] for card in cards])
  return np.stack([steps, losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)])


def _legend(frame: svg.Frame, curves: Mapping[str, np.ndarray]) -> str:
  """Names the arms, the best one first, with their last losses."""
  order = sorted(enumerate(curves.items()), key=lambda entry: entry[1][1][1, -1])
  rows = []
  x = frame.width - _LEGEND_WIDTH + 14
  for row, (index, (arm, curve)) in enumerate(order):
    y = frame.top + 8 + _ROW * row
    rows.append(f'<path class="line s{index}" d="M{x} {y}h22"/>')
    rows.append(svg.text(x + 29, y + 4, f"{arm} {curve[1, -1]:.4f}", "name"))
  return "".join(rows)


def _style(count: int) -> str:
  rules = []
  for index in range(count):
    color = _COLORS[index % len(_COLORS)]
    dash = _DASHES[index // len(_COLORS) % len(_DASHES)]
    rules.append(f".line.s{index} {{ stroke: #{color}; stroke-dasharray: {dash or 'none'}; }}")
    rules.append(f".dot.s{index}, .band.s{index} {{ fill: #{color}; }}")
  return _STYLE % "\n".join(rules)
