"""Draw each expert's load over time as a heat map around the even share 1/E."""

import base64
import math
import struct
import zlib

import numpy as np

from moe_jax.analysis import svg
from moe_jax.analysis.text import percent

_COLUMNS = 240
_LIMITS = (1.25, 1.5, 2, 4, 8)
_OVER, _UNDER = (213, 94, 0), (0, 114, 178)  # Okabe and Ito's vermillion and blue
_MAX_HEIGHT, _MAX_ROW = 330, 18


def ratio_limit(loads: list[np.ndarray]) -> float:
  """Chooses how many times 1/E the strongest colour means: the least that covers 90 % of cells.

  Args:
    loads: (N, E) shares of each layer; all layers get one limit so that they compare.
  """
  ratios = np.concatenate([(load * load.shape[1]).ravel() for load in loads])
  ratios = np.maximum(ratios[np.isfinite(ratios)], 1e-9)
  reach = np.quantile(np.exp(np.abs(np.log(ratios))), 0.9) if ratios.size else 1.0
  return next((limit for limit in _LIMITS if limit >= reach), _LIMITS[-1])


def resample(steps: np.ndarray, load: np.ndarray, columns: int) -> np.ndarray:
  """Averages rows into equal stretches of steps; a stretch without a row repeats the one before.

  Args:
    steps: (N,) increasing.
    load: (N, E) shares.
    columns: number of stretches between the first and the last step.

  Returns:
    (columns, E) shares.
  """
  edges = np.linspace(steps[0], steps[-1], columns + 1)[1:-1]
  column = np.searchsorted(edges, steps, side="left")
  result = np.empty((columns, load.shape[1]))
  previous = load[0]
  for index in range(columns):
    members = load[column == index]
    previous = members.mean(axis=0) if len(members) else previous
    result[index] = previous
  return result


def heat_map(steps: np.ndarray, load: np.ndarray, limit: float, description: str) -> str:
  """Draws experts (rows) by steps (columns) as an <svg>.

  Args:
    steps: (N,) increasing.
    load: (N, E) shares.
    limit: the ratio to 1/E with the strongest colour.
    description: read aloud in place of the picture.
  """
  num_experts = load.shape[1]
  row = min(_MAX_ROW, _MAX_HEIGHT / num_experts)
  height = max(round(row * num_experts), 18)
  last_step = max(steps[-1], steps[0] + 1)
  frame = svg.Frame(
    860, height + 44, 58, 72, 4, 40, (float(steps[0]), float(last_step)), (num_experts, 0)
  )
  cells = resample(steps, load, min(_COLUMNS, len(steps)))
  image = base64.b64encode(png(load_colours(cells.T, limit))).decode()
  body = (
    f'<rect class="plate" x="{frame.left}" y="{frame.top}" width="{frame.plot_width}" '
    f'height="{frame.plot_height}"/>'
    f'<image x="{frame.left}" y="{frame.top}" width="{frame.plot_width}" '
    f'height="{frame.plot_height}" preserveAspectRatio="none" '
    f'href="data:image/png;base64,{image}"/>'
  )
  return svg.document(frame, body + _labels(frame, load[-1], last_step), description)


def _labels(frame: svg.Frame, last_load: np.ndarray, last_step: int) -> str:
  num_experts = len(last_load)
  row = frame.plot_height / num_experts
  stride = max(1, 2 ** math.ceil(math.log2(13 / row)))
  parts = []
  for expert in range(0, num_experts, stride):
    y = frame.top + (expert + 0.5) * row + 4
    parts.append(svg.text(frame.left - 8, y, str(expert), "tick end"))
    if stride == 1:
      label = percent(float(last_load[expert]))
      parts.append(svg.text(frame.width - frame.right + 8, y, label, "tick"))
  bottom = frame.top + frame.plot_height
  ticks, distance = svg.nice_ticks(*frame.x_range, 6)
  for tick in ticks:
    if tick == int(tick):
      parts.append(
        svg.text(frame.x(tick), bottom + 16, svg.tick_label(tick, max(distance, 1)), "tick mid")
      )
  middle = frame.left + frame.plot_width / 2
  parts.append(svg.text(middle, frame.height - 5, "step", "name mid"))
  return "".join(parts)


def load_colours(load: np.ndarray, limit: float) -> np.ndarray:
  """Colours shares: clear at 1/E, deeper vermillion above it, deeper blue below, on a log scale.

  Args:
    load: (E, columns) shares.
    limit: the ratio to 1/E with the full colour.

  Returns:
    (E, columns, 4) uint8 RGBA.
  """
  ratio = np.maximum(np.nan_to_num(load * load.shape[0], nan=1.0), 1e-9)
  strength = np.clip(np.log(ratio) / math.log(limit), -1, 1)
  colours = np.empty((*load.shape, 4), np.uint8)
  colours[..., :3] = np.where(strength[..., None] > 0, _OVER, _UNDER)
  colours[..., 3] = np.round(255 * np.abs(strength))
  return colours


def png(pixels: np.ndarray) -> bytes:
  """Encodes (height, width, 4) uint8 RGBA as a PNG file."""
  height, width, _ = pixels.shape
  # Every scan line starts with its filter type; 0 is none.
  lines = np.pad(pixels.reshape(height, width * 4), ((0, 0), (1, 0)))
  header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + _chunk(b"IHDR", header)
    + _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
    + _chunk(b"IEND", b"")
  )


def _chunk(kind: bytes, content: bytes) -> bytes:
  checksum = zlib.crc32(kind + content)
  return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
