"""One page on how a model routes, for people who would rather look than read."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.analysis import svg
from moe_jax.analysis.page import page, plain_section, table
from moe_jax.analysis.routing_measures import MEANINGS, Measure
from moe_jax.analysis.text import escape, percent, significant

_CELL, _LABEL = 26, 126
_STYLES = ("c1", "c2", "c3", "c4", "c6", "c5")
# Twice the even share, and more, has the full colour.
_FULL = 2.0
_MOST_EXPERTS = 64


@dataclasses.dataclass(frozen=True)
class AnalysisResults:
  """What the page shows.

  Attributes:
    run: name of the run.
    step: of the checkpoint.
    tokens: that were routed.
    domains: names of the texts.
    measures: of the checkpoint, and between checkpoints.
    shares: for each MoE layer (domains, E), the share of a domain's tokens that ask each expert.
    pairs: for each MoE layer (E, E), the share of an expert's tokens that ask another one too;
      none where a token asks a single expert.
    losses: held-out nats per token, by what was changed; the model itself first.
    tops: for each MoE layer and expert the text of its most telling tokens.
  """

  run: str
  step: int
  tokens: int
  domains: tuple[str, ...]
  measures: Sequence[Measure]
  shares: Sequence[np.ndarray]
  pairs: Sequence[np.ndarray]
  losses: Mapping[str, float]
  tops: Sequence[Sequence[Sequence[str]]]


def render(found: AnalysisResults) -> str:
  """Returns the page."""
  title = f"Routing of {found.run}"
  domains = ", ".join(found.domains)
  header = (
    f'<header><p class="kicker">moe_jax analysis</p><h1>{escape(title)}</h1>'
    f'<p class="subtitle">Step {found.step:,}; {found.tokens:,} held-out tokens of'
    f" {escape(domains)}; dropless.</p></header>"
  )
  return page(title, "\n".join((header, *sections(found).values())))


def sections(found: AnalysisResults) -> dict[str, str]:
  """Returns the sections of the page by their titles, those without content left out."""
  parts = {
    "Measures": (
      _table_of_measures(found),
      "Behind each measure, in grey, what a router that ignores its input would show of as many"
      " tokens.",
    ),
    "Who reads what": (
      _figures("layer", found.shares, found.domains),
      "Rows are texts, columns experts. Clear is an even share of the text's tokens, full colour"
      " twice as much or nothing: vermillion above, blue below.",
    ),
    "Words of the experts": (
      _words(found.tops),
      "Tokens that set each expert apart, the most telling first. ␣ is a space, \\n a line break.",
    ),
    "Who works together": (
      _pairs(found) if found.pairs else "",
      "Of the tokens of a row's expert, the share that ask for the column's too, coloured around"
      " the row's mean in the same way.",
    ),
    "Over training": (_changes(found), ""),
    "What it is worth": (
      _losses(found.losses),
      "Held-out loss when routing is changed at evaluation, without training anew: above the model"
      " as it is (vermillion), or below (blue).",
    ),
  }
  return {
    title: plain_section(title, body, caption) for title, (body, caption) in parts.items() if body
  }


def _table_of_measures(found: AnalysisResults) -> str:
  layers = range(len(found.shares))
  rows = []
  for name, meaning in MEANINGS.items():
    own = {m.layer: m for m in found.measures if m.name == name and m.step is None}
    if not own:
      continue
    columns = [own.get(None)] if None in own else [own.get(layer) for layer in layers]
    span = f' colspan="{len(layers)}"' if None in own else ""
    cells = "".join(f'<td class="number"{span}>{_value(measure)}</td>' for measure in columns)
    words = escape(name.replace("_", " "))
    about = f'<small style="margin:0">{escape(meaning)}</small>'
    rows.append(f"<tr><th>{words}<br>{about}</th>{cells}</tr>")
  return table(["", *(f"layer {layer}" for layer in layers)], rows)


def _value(measure: Measure | None) -> str:
  if measure is None:
    return ""
  floor = "" if measure.floor is None else f" <small>{significant(measure.floor)}</small>"
  return significant(measure.value) + floor


def _figures(name: str, tables: Sequence[np.ndarray], rows: Sequence[str]) -> str:
  drawn = [
    f"<figure><h3>{name} {index}</h3>{_heat(shares, rows)}</figure>"
    for index, shares in enumerate(tables)
  ]
  return "".join(drawn)


def _heat(shares: np.ndarray, rows: Sequence[str]) -> str:
  """Draws rows of shares around their mean; what is NaN stays clear."""
  shares = shares[:, :_MOST_EXPERTS]
  even = np.nanmean(shares, axis=1, keepdims=True)
  ratios = np.nan_to_num(np.divide(shares, even, out=np.ones_like(shares), where=even > 0), nan=1.0)
  width, height = _LABEL + _CELL * shares.shape[1], 18 + _CELL * len(rows)
  frame = svg.Frame(width, height, 0, 0, 0, 0, (0, 1), (0, 1))
  cells = []
  for y, (label, row) in enumerate(zip(rows, ratios, strict=True)):
    cells.append(svg.text(0, 18 + _CELL * y + 17, label, "name"))
    for x, ratio in enumerate(row):
      cells.append(_cell(x, y, float(ratio), f"{label}, expert {x}: {ratio:.2f} times even"))
  names = [
    svg.text(_LABEL + _CELL * (x + 0.5), 12, str(x), "name mid") for x in range(len(ratios[0]))
  ]
  picture = svg.document(frame, "".join(names + cells), "Shares of experts")
  return f'<div style="max-width:{width}px">{picture}</div>'


def _cell(x: int, y: int, ratio: float, words: str) -> str:
  above = ratio >= 1
  strength = min((ratio - 1) / (_FULL - 1), 1.0) if above else 1 - ratio
  colour = "213 94 0" if above else "0 114 178"
  place = f'x="{_LABEL + _CELL * x}" y="{18 + _CELL * y}" width="{_CELL - 2}" height="{_CELL - 2}"'
  return (
    f'<rect {place} rx="3" class="plate" style="fill:rgb({colour} / {strength:.2f})">'
    f"<title>{escape(words)}</title></rect>"
  )


def _words(tops: Sequence[Sequence[Sequence[str]]]) -> str:
  blocks = []
  for layer, experts in enumerate(tops):
    blocks.append(f"<h3>layer {layer}</h3>")
    cells = []
    for number, tokens in enumerate(experts[:_MOST_EXPERTS]):
      listed = "".join(f"<li><code>{escape(token)}</code></li>" for token in tokens)
      body = f"<ol>{listed}</ol>" if listed else '<p class="missing">no preference</p>'
      cells.append(f'<div class="expert"><h4>expert {number}</h4>{body}</div>')
    blocks.append(f'<div class="experts many">{"".join(cells)}</div>')
  return "".join(blocks)


def _pairs(found: AnalysisResults) -> str:
  if len(found.pairs[0]) > _MOST_EXPERTS:
    return f'<p class="missing">Drawn for up to {_MOST_EXPERTS} experts.</p>'
  names = [f"expert {i}" for i in range(len(found.pairs[0]))]
  # An expert's tokens always ask for itself.
  others = [np.where(np.eye(len(pairs), dtype=bool), np.nan, pairs) for pairs in found.pairs]
  return _figures("layer", others, names)


def _changes(found: AnalysisResults) -> str:
  """Draws saturation over the saved checkpoints; empty where there is one alone."""
  of_layers: dict[int, list[Measure]] = {}
  for measure in found.measures:
    if measure.name == "saturation":
      of_layers.setdefault(measure.layer, []).append(measure)
  if not of_layers:
    return ""
  steps = np.array([m.step for m in next(iter(of_layers.values()))], np.float64)
  frame = svg.Frame(860, 260, 56, 120, 26, 40, (float(steps[0]), float(steps[-1])), (0.0, 1.0))
  body = svg.axes(frame, x_label="step") + svg.text(4, 13, "saturation", "name")
  for layer, measures in of_layers.items():
    style = _STYLES[layer % len(_STYLES)]
    values = np.array([m.value for m in measures])
    body += svg.line(frame, steps, values, style, marks=True)
    body += svg.text(752, 40 + 19 * layer, f"layer {layer}", f"label {style}")
  floor = next(iter(of_layers.values()))[0].floor
  caption = f"{MEANINGS['saturation']} Unrelated routers: {percent(floor)}."
  picture = svg.document(frame, body, "Saturation over training")
  return f'{picture}<p class="caption">{escape(caption)}</p>'


def _losses(losses: Mapping[str, float]) -> str:
  own, *changed = losses.items()
  worst = max([abs(loss - own[1]) for _, loss in changed], default=0.0) or 1.0
  rows = [f"<tr><th>{escape(own[0])}</th><td>{own[1]:.4f}</td><td></td><td></td></tr>"]
  for name, loss in changed:
    delta = loss - own[1]
    colour = "var(--c2)" if delta > 0 else "var(--c1)"
    style = f"width:{abs(delta) / worst:.1%};background:{colour}"
    bar = f'<div class="bar"><i style="{style}"></i></div>'
    rows.append(
      f'<tr><th>{escape(name)}</th><td class="number">{loss:.4f}</td>'
      f'<td class="number">{delta:+.4f}</td><td style="width:40%">{bar}</td></tr>'
    )
  return table(("", "nats per token", "difference", ""), rows)
