"""The command `moe-jax conventions`."""

import shutil
from types import SimpleNamespace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moe_jax.analysis import routing_words as words
from moe_jax.analysis.conventions import (
  SAMPLE_SHAPE,
  Comparison,
  SampleOutcome,
  compare,
  differences,
  same_size,
)
from moe_jax.moe.presets import preset, preset_names

_WIDTH = 120

_COLUMNS = {
  "score": words.score_words,
  "selection, K of E": words.selection_words,
  "weights": words.weight_words,
  "slots C of an expert": words.capacity_words,
  "full expert": words.overflow_words,
  "group": words.group_words,
  "losses": words.loss_words,
}

_CAPTION = (
  "S tokens of a routing group, E experts, K choices, f capacity factor. Scores, weights and losses"
  " are float32, and padding takes no slot, in every one of them. Balance loss: E sum_e f_e P_e, 1"
  " at uniform routing (K where f counts all choices)."
)


def conventions(args: SimpleNamespace) -> None:
  """Prints the table of all presets, or in what two of them differ and what that changes."""
  width = max(_WIDTH, shutil.get_terminal_size((_WIDTH, 0)).columns)
  # Plain text wherever it goes: a redirected table must not hold escape codes.
  console = Console(width=width, highlight=False, color_system=None)
  if args.diff is None:
    console.print(_all_presets())
    return
  first, second = args.diff
  _print_differences(console, first, second)
  result = compare(*same_size(first, second), seed=args.sample)
  _print_comparison(console, (first, second), result, args.sample)


def _table(*columns: str) -> Table:
  table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
  for column in columns:
    table.add_column(column, overflow="fold")
  return table


def _all_presets() -> Table:
  table = _table("preset", *_COLUMNS)
  table.columns[0].no_wrap = True
  table.caption, table.caption_justify, table.caption_style = _CAPTION, "left", ""
  for name in preset_names():
    config = preset(name)
    table.add_row(name, *(describe(config) for describe in _COLUMNS.values()))
  return table


def _print_differences(console: Console, first: str, second: str) -> None:
  table = _table("what", "field", first, second)
  for difference in differences(preset(first), preset(second)):
    table.add_row(difference.meaning, difference.field, *difference.values)
  if not table.row_count:
    console.print(f"{first} and {second} do not differ.")
    return
  console.print(table)


def _print_comparison(
  console: Console, names: tuple[str, str], result: Comparison, seed: int
) -> None:
  B, L = SAMPLE_SHAPE
  console.print(
    f"On random logits of {B} sequences of {L} tokens (seed {seed}; lower expert ids preferred),"
    f" {result.configs[0].num_experts} experts for both, in training:"
  )
  table = _table("", *names)
  for label, show in _OUTCOMES.items():
    table.add_row(label, *(show(outcome) for outcome in result.outcomes))
  own = (preset(name).top_k for name in names)
  table.add_row(
    "K", *(_choices(config.top_k, k) for config, k in zip(result.configs, own, strict=True))
  )
  console.print(table)
  console.print(
    f"{_percent(result.asked_differently)} of tokens ask different sets of experts,"
    f" {_percent(result.seen_differently)} are seen by different ones after drops,"
    f" {_percent(result.dropped_differently)} lose a different number of assignments."
  )


def _choices(top_k: int, own: int) -> str:
  """Returns K of the comparison, and the preset's own where it had to give way."""
  return str(top_k) if top_k == own else f"{top_k}, own {own}"


def _percent(share: float) -> str:
  return f"{100 * share:.1f} %"


def _loss(outcome: SampleOutcome) -> str:
  return "none" if outcome.balance_loss is None else f"{outcome.balance_loss:.4f}"


def _uniform(outcome: SampleOutcome) -> str:
  return "none" if outcome.balance_loss is None else str(outcome.balance_at_uniform)


def _weighted(outcome: SampleOutcome) -> str:
  if outcome.balance_loss is None:
    return "none"
  return f"{outcome.balance_weight * outcome.balance_loss:.3g}"


_OUTCOMES = {
  "routing groups": lambda outcome: str(outcome.num_groups),
  "slots of an expert in a group": lambda outcome: str(outcome.capacity),
  "assignments dropped": lambda outcome: _percent(outcome.dropped),
  "experts that see a token, mean": lambda outcome: f"{outcome.experts_per_token:.3f}",
  "balance loss": _loss,
  "its value at uniform routing": _uniform,
  "times its coefficient": _weighted,
}
