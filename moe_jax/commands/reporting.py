"""The command `moe-jax report`."""

from pathlib import Path
from types import SimpleNamespace

from moe_jax.analysis.report import write_report
from moe_jax.sweep.leaderboard import is_recipes_folder, write_pages


def report(args: SimpleNamespace) -> None:
  """Writes report.html of a run, with other runs beside it if asked for; or the recipes' pages."""
  folder = Path(args.workdir)
  if not is_recipes_folder(folder):
    print(write_report(args.workdir, compare=args.compare))
    return
  for path in write_pages(folder):
    print(path)
