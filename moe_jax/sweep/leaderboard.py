"""Pages made of cards: one a recipe, and experiments/RESULTS.md with a row for each claim.

Nothing in them is written by hand: what a recipe says, what cards hold and what papers claim is all
they are made of, so that they can be made again byte for byte.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_jax.errors import UserError
from moe_jax.sweep.cards import Card
from moe_jax.sweep.claims import Claim, Finding, expectation, judge
from moe_jax.sweep.figures import draw_curves
from moe_jax.sweep.paper_values import PaperValue, read_paper_values
from moe_jax.sweep.printed_sizes import PrintedSizes, load_sizes, size_rows, sizes_page
from moe_jax.sweep.recipe import Profile, Recipe, Scale, load_recipe
from moe_jax.sweep.results import ArmRow, arm_rows, loss_text
from moe_jax.sweep.running import finished_card

CONFIG_FILE, CARDS, PAGE, FIGURE = "config.py", "cards", "README.md", "curves.svg"
RESULTS_FILE, VALUES_FILE, SIZES_FILE = "RESULTS.md", "paper_values.yaml", "sizes.py"
_GENERATED = "<!-- Written by `moe-jax report experiments/`; do not edit. -->"
_NOT_RUN = "not run yet"


@dataclasses.dataclass(frozen=True)
class Results:
  """What there is of a recipe.

  Attributes:
    recipe: its arms and claims.
    folder: it stands in.
    cards: of each arm whose seeds are all there, in their order.
    missing: runs without a card.
  """

  recipe: Recipe
  folder: Path
  cards: dict[str, list[Card]]
  missing: int

  def finding(self, claim: Claim) -> Finding | None:
    """Returns what became of a claim; None if an arm it reads is not complete."""
    there = self.cards.keys() >= set(claim.arms)
    return judge(claim, self.cards) if there else None


def is_recipes_folder(folder: Path) -> bool:
  """Tells whether a folder holds recipes."""
  return (folder / VALUES_FILE).is_file()


def write_pages(root: Path) -> list[Path]:
  """Writes the pages of all recipes in a folder, and the leaderboard.

  Returns:
    The files that were written.

  Raises:
    UserError: a recipe or a card is damaged, or a claim quotes a number that is not listed.
  """
  values = read_paper_values(root / VALUES_FILE)
  results = [load_results(path) for path in sorted(root.glob(f"*/{CONFIG_FILE}"))]
  sizes = {path.parent: load_sizes(str(path)) for path in sorted(root.glob(f"*/{SIZES_FILE}"))}
  pages = {root / RESULTS_FILE: leaderboard(results, values, sizes)}
  for folder, own in sizes.items():
    pages[folder / PAGE] = f"{_GENERATED}\n{sizes_page(own)}"
  for each in results:
    pages[each.folder / PAGE] = recipe_page(each, values)
    if each.cards:
      pages[each.folder / FIGURE] = draw_curves(each.cards)
  for path, text in pages.items():
    path.write_text(text)
  return list(pages)


def load_results(config: Path) -> Results:
  """Reads a recipe and the cards that lie beside it."""
  recipe, folder = load_recipe(str(config)), config.parent
  found: dict[str, list[Card | None]] = {}
  for run in recipe.runs(Profile.FULL):
    found.setdefault(run.arm, []).append(finished_card(run, folder / CARDS))
  cards = {arm: own for arm, own in found.items() if None not in own}
  missing = sum(own.count(None) for own in found.values())
  return Results(recipe, folder, cards, missing)


def leaderboard(
  results: Sequence[Results],
  values: Mapping[str, PaperValue],
  sizes: Mapping[Path, PrintedSizes],
) -> str:
  """Returns RESULTS.md: claims that were trained for, and parameter counts by their folder."""
  rows = [_claim_row(each, claim, values) for each in results for claim in each.recipe.claims]
  return "\n".join(
    [
      _GENERATED,
      "# Claims of papers, and what became of them here",
      "",
      "Losses are held-out nats per token, dropless. *Ours* is the mean over seeds of the paired",
      "difference (or of what the claim names) with its 95 % interval. The rules are those of",
      "`moe_jax.sweep.claims`, written down with their margins before the runs. *Cost* is in CPU",
      "minutes of the runs that the claim reads; claims and recipes share runs.",
      "",
      *_table(_CLAIM_HEAD, rows),
      "",
      *(line for folder, own in sizes.items() for line in _sizes_section(folder.name, own)),
    ]
  )


def _sizes_section(name: str, sizes: PrintedSizes) -> list[str]:
  return [
    "## Parameter counts that papers print",
    "",
    "Exact counts of the published sizes; REPRODUCED if they round to the printed digits, for the",
    "active ones with or without embeddings, which papers leave out as they like.",
    f"[{name}]({name}) has all conventions and what explains the differences.",
    "",
    *_table(
      ["model", "count", "printed", "exact", "difference", "verdict", "config"],
      size_rows(sizes.figures),
    ),
    "",
  ]


def recipe_page(results: Results, values: Mapping[str, PaperValue]) -> str:
  """Returns the README of a recipe."""
  recipe, scale = results.recipe, results.recipe.scale(Profile.FULL)
  parts = [
    _GENERATED,
    f"# {recipe.title}",
    "",
    f"**Hypothesis.** {recipe.hypothesis}",
    "",
    f"**Scaled down.** {recipe.scaled_down}",
    "",
    f"**Matched by** {recipe.matched}.",
    "",
    f"**Command.** `{_command(recipe)} --workers=2`: {len(recipe.runs(Profile.FULL))} runs"
    f" of {scale.steps:,} steps{_other_steps(scale)},"
    f" seeds {', '.join(map(str, scale.seeds))}{_cost(results)}",
    "",
    "## Claims",
    "",
    *_table(
      ["claim", "paper", "expected", "ours", "verdict"],
      [_own_claim_row(results, claim, values) for claim in recipe.claims],
    ),
    "",
  ]
  if results.cards:
    parts += ["## Arms", "", *_table(_ARM_HEAD, map(_arm_row, arm_rows(results.cards))), ""]
    parts += [f"![held-out loss of each arm over steps]({FIGURE})", ""]
  if results.missing:
    parts += [f"{results.missing} runs have no card yet.", ""]
  return "\n".join(parts)


_CLAIM_HEAD = ["recipe", "claim", "paper", "expected", "ours", "seeds", "verdict", "command"]
_CLAIM_HEAD += ["cost", "commit"]
_ARM_HEAD = ["arm", "parameters", "active", "FLOPs per token", "held-out nats"]
_ARM_HEAD += ["held-out max violation", "dropped in training", "CPU s a run"]


def _other_steps(scale: Scale) -> str:
  each = [f"{arm} {steps:,}" for arm, steps in scale.steps_of.items()]
  return f" ({', '.join(each)})" if each else ""


def _command(recipe: Recipe) -> str:
  config = f"experiments/{recipe.name}/{CONFIG_FILE}"
  return f"moe-jax sweep --config={config} --profile={Profile.FULL}"


def _cost(results: Results) -> str:
  cards = [card for own in results.cards.values() for card in own]
  if not cards:
    return "."
  return f". Cost: {_minutes(cards):.0f} CPU minutes for the {len(cards)} runs below."


def _minutes(cards: Sequence[Card]) -> float:
  return sum(card["cpu_seconds"] for card in cards) / 60


def _claim_row(results: Results, claim: Claim, values: Mapping[str, PaperValue]) -> list[str]:
  finding = results.finding(claim)
  name = results.recipe.name
  cells = _own_claim_row(results, claim, values)
  seeds = "" if finding is None or finding.measured is None else str(finding.measured.n)
  cards = [card for arm in claim.arms for card in results.cards.get(arm, ())]
  cost = f"{_minutes(cards):.0f}" if finding else ""
  commits = ", ".join(sorted({str(card["origin"]["commit"]) for card in cards}))
  command = f"`{_command(results.recipe)}`"
  return [f"[{name}]({name})", *cells[:4], seeds, cells[4], command, cost, commits]


def _own_claim_row(results: Results, claim: Claim, values: Mapping[str, PaperValue]) -> list[str]:
  finding = results.finding(claim)
  ours, verdict = "", _NOT_RUN
  if finding is not None:
    ours = "" if finding.measured is None else str(finding.measured)
    verdict = f"**{finding.verdict}**" + (f" ({finding.why})" if finding.why else "")
  return [claim.text, _paper(claim, values), expectation(claim), ours, verdict]


def _paper(claim: Claim, values: Mapping[str, PaperValue]) -> str:
  if not claim.paper:
    return ""
  if claim.paper not in values:
    raise UserError(f"claim {claim.name} quotes {claim.paper!r}, which {VALUES_FILE} has not")
  value = values[claim.paper]
  number = "" if value.value is None else f"{value.value:g} {value.unit}: "
  doubt = "" if value.verified else " (not checked in the paper)"
  return f"{number}{value.note}; {value.source}{doubt}"


def _arm_row(row: ArmRow) -> list[str]:
  return [
    row.arm,
    f"{row.parameters:,}",
    f"{row.active:,}",
    f"{row.flops_per_token:,.0f}",
    loss_text(row),
    "" if row.max_violation is None else f"{row.max_violation:.3f}",
    "" if row.dropped_fraction is None else f"{100 * row.dropped_fraction:.2f} %",
    f"{row.cpu_seconds:.0f}",
  ]


def _table(head: Sequence[str], rows) -> list[str]:
  lines = [head, ["---"] * len(head), *rows]
  return ["| " + " | ".join(line) + " |" for line in lines]
