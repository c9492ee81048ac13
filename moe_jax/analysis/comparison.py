"""Set a run beside others: results, and the settings in which they differ."""

import json
from collections.abc import Sequence

from moe_jax.analysis.run_folder import Run
from moe_jax.analysis.text import compact, escape, fixed

_MAX_DIFFERENCES = 8


def labelled(runs: Sequence[Run]) -> list[tuple[str, Run]]:
  """Names each run by its folder, and by the parent too where names repeat."""
  names = [run.name for run in runs]
  return [
    (run.name if names.count(run.name) == 1 else f"{run.path.parent.name}/{run.name}", run)
    for run in runs
  ]


def section(run: Run, others: Sequence[tuple[str, Run]]) -> str:
  """Writes the table of runs, the reported one first."""
  rows = [_row(f"{run.name} (this run)", run, "")]
  rows += [_row(label, other, differences(run, other)) for label, other in others]
  header = "".join(
    f"<th>{name}</th>"
    for name in ("run", "held-out loss", "bits/byte", "active", "tokens", "differs in")
  )
  return (
    '<section id="comparison"><h2>Comparison</h2><div class="scroll"><table class="runs">'
    f"<thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    '<p class="caption">Held-out results at the end of each run, one run each: without more seeds '
    "a small difference may be chance. The last column lists settings that differ from this "
    "run's.</p></section>"
  )


def differences(run: Run, other: Run) -> str:
  """Lists the settings of `other` that are not `run`'s, as `path=value`, the report's left out."""
  mine, theirs = _flat(run.config or {}), _flat(other.config or {})
  changed = [
    f"{path}={json.dumps(theirs.get(path), ensure_ascii=False)}"
    for path in sorted(mine.keys() | theirs.keys())
    if mine.get(path) != theirs.get(path) and not path.startswith("report.")
  ]
  rest = len(changed) - _MAX_DIFFERENCES
  return ", ".join(changed[:_MAX_DIFFERENCES]) + (f" and {rest} more" if rest > 0 else "")


def _row(label: str, run: Run, changed: str) -> str:
  tokens = run.result("tokens_seen") or run.series("tokens").last
  cells = (
    fixed(run.evaluated("loss"), 3),
    fixed(run.evaluated("bits_per_byte"), 3),
    compact(run.result("parameters.active")),
    compact(tokens),
  )
  numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
  return f"<tr><th>{escape(label)}</th>{numbers}<td><code>{escape(changed)}</code></td></tr>"


def _flat(tree: dict, prefix: str = "") -> dict:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat
