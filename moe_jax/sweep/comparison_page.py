"""One page that compares the arms of a recipe, for people who would rather look than read."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_jax.analysis.page import page, plain_section, table, write_whole
from moe_jax.analysis.text import compact, escape, fixed, percent
from moe_jax.sweep.cards import Card
from moe_jax.sweep.claims import Finding, expectation
from moe_jax.sweep.figures import draw_curves
from moe_jax.sweep.recipe import Recipe
from moe_jax.sweep.results import ArmRow, arm_rows, loss_text

PAGE = "comparison.html"
_HEAD = ("arm", "held-out nats", "max violation", "dropped", "active", "total", "CPU s a run")


def write_comparison(
  folder: Path, recipe: Recipe, cards: Mapping[str, Sequence[Card]], findings: Sequence[Finding]
) -> Path:
  """Writes the page of a sweep beside its cards and returns its path."""
  path = folder / PAGE
  write_whole(path, render(recipe, cards, findings))
  return path


def render(recipe: Recipe, cards: Mapping[str, Sequence[Card]], findings: Sequence[Finding]) -> str:
  """Returns the page: curves, the table of arms, verdicts, and where the tokens went."""
  first = next(iter(cards.values()))
  tokens = [card["tokens"] for own in cards.values() for card in own]
  # Arms may train for other numbers of steps.
  ends = sorted({min(tokens), max(tokens)})
  count = f"{len(first)} seed{'s' if len(first) > 1 else ''}, "
  count += f"{' to '.join(f'{end:,}' for end in ends)} tokens a run"
  parts = [
    f'<header><p class="kicker">moe_jax comparison</p><h1>{escape(recipe.title)}</h1>'
    f'<p class="subtitle">{escape(recipe.hypothesis)}</p></header>',
    plain_section("Loss", draw_curves(cards), f"Mean over seeds and their range; {count}."),
    plain_section("Arms", _arms(arm_rows(cards)), f"The best first. Matched by {recipe.matched}."),
    plain_section("Claims", _claims(findings), "") if findings else "",
    plain_section(
      "Where the tokens went",
      _loads(cards),
      "Share of the held-out tokens that each expert is asked for, the first seed's, by MoE layer;"
      " full width is twice the even share.",
    ),
  ]
  return page(recipe.title, "\n".join(filter(None, parts)))


def _arms(rows: Sequence[ArmRow]) -> str:
  lines = []
  for row in sorted(rows, key=lambda row: math.inf if row.loss is None else row.loss.mean):
    cells = (
      loss_text(row),
      fixed(row.max_violation, 3),
      percent(row.dropped_fraction),
      compact(row.active),
      compact(row.parameters),
      fixed(row.cpu_seconds, 0),
    )
    lines.append([row.arm, *cells])
  return _table(_HEAD, lines)


def _claims(findings: Sequence[Finding]) -> str:
  rows = [
    [
      finding.claim.text,
      expectation(finding.claim),
      "" if finding.measured is None else str(finding.measured),
      finding.verdict + (f" ({finding.why})" if finding.why else ""),
    ]
    for finding in findings
  ]
  return _table(("claim", "expected", "measured", "verdict"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  return table(
    head,
    (
      f"<tr><th>{escape(first)}</th>"
      + "".join(f'<td class="number">{escape(cell)}</td>' for cell in rest)
      + "</tr>"
      for first, *rest in rows
    ),
  )


def _loads(cards: Mapping[str, Sequence[Card]]) -> str:
  figures = []
  for arm, own in cards.items():
    for number, layer in enumerate(own[0].get("routing", {}).get("per_layer", ())):
      even = 1 / len(layer["load"])
      bars = "".join(
        f'<div class="bar"><i style="width:{min(share / even / 2, 1):.1%}"></i></div>'
        for share in layer["load"]
      )
      name = f"{escape(arm)}<span>layer {number + 1}</span>"
      figures.append(f'<div class="expert"><h4>{name}</h4>{bars}</div>')
  return f'<div class="experts">{"".join(figures)}</div>'
