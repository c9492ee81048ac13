"""The command `moe-jax sweep`."""

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

from moe_jax.commands.tables import WIDTH, compact, plain_table
from moe_jax.errors import UserError
from moe_jax.sweep.cards import card_file
from moe_jax.sweep.claims import Finding, expectation
from moe_jax.sweep.comparison_page import write_comparison
from moe_jax.sweep.recipe import Recipe, Run, load_recipe
from moe_jax.sweep.results import ArmRow, arm_rows, cards_by_arm, findings, loss_text
from moe_jax.sweep.running import finished_card, run_and_write, run_folder
from moe_jax.sweep.workers import Job, command_of, run_jobs


def sweep(args: SimpleNamespace) -> None:
  """Does the runs of a recipe that have no card yet, and shows what all of them came to."""
  recipe = load_recipe(args.config)
  runs = recipe.runs(args.profile)
  for run in runs:
    # A bad config is refused before the first run, not in between.
    run.mapping()
  workdir = Path(args.workdir)
  cards = Path(args.cards or workdir / "cards" / recipe.name / args.profile)
  if args.workers < 1:
    raise UserError(f"--workers={args.workers} is refused: it must be at least 1")
  if args.list:
    _print_runs(runs, cards)
  elif args.index is not None:
    _do_one(runs, args.index, workdir, cards)
  else:
    _do_all(args, recipe, runs, workdir, cards)


def _do_one(runs: list[Run], index: int, workdir: Path, cards: Path) -> None:
  if not 0 <= index < len(runs):
    raise UserError(f"--index={index} is none of the {len(runs)} runs; --list shows them")
  run = runs[index]
  if finished_card(run, cards) is None:
    run_and_write(run, workdir, cards)
  print(f"{run.name}: {card_file(cards, run.arm, run.seed)}")


def _do_all(
  args: SimpleNamespace, recipe: Recipe, runs: list[Run], workdir: Path, cards: Path
) -> None:
  for run in runs:
    # A card of another config likewise.
    finished_card(run, cards)
  progress = _Progress(runs, cards, args.workers)
  jobs = [
    Job(
      name=run.name,
      command=command_of(args.config, args.profile, index, workdir, cards),
      folder=run_folder(run, workdir),
      log=cards / "logs" / f"{run.name}.txt",
      is_done=card_file(cards, run.arm, run.seed).exists,
      may_start=partial(_source_is_done, run, cards),
    )
    for index, run in enumerate(runs)
    if not card_file(cards, run.arm, run.seed).exists()
  ]
  run_jobs(jobs, args.workers, progress.done)
  found = cards_by_arm(recipe, args.profile, cards)
  _print_arms(recipe, arm_rows(found))
  judged = findings(recipe, args.profile, found)
  _print_findings(recipe, args.profile, judged)
  print(f"\ncards in {cards}; open {write_comparison(cards, recipe, found, judged)}")


def _source_is_done(run: Run, cards: Path) -> bool:
  return run.source is None or card_file(cards, run.source.arm, run.seed).exists()


class _Progress:
  """Says what is done and how long the rest will take."""

  def __init__(self, runs: list[Run], cards: Path, workers: int):
    self._total, self._workers, self._started = len(runs), workers, time.monotonic()
    self._before = sum(card_file(cards, run.arm, run.seed).exists() for run in runs)
    self._done = 0
    print(f"{self._total} runs, {self._before} done before, {workers} at a time", flush=True)

  def done(self, job: Job) -> None:
    """Says that a run is done."""
    self._done += 1
    left = self._total - self._before - self._done
    seconds = (time.monotonic() - self._started) / self._done * left
    count = self._before + self._done
    rest = f", about {seconds / 60:.0f} min to go" if left else ""
    print(f"{count} of {self._total}: {job.name}{rest}", flush=True)


def _print_runs(runs: list[Run], cards: Path) -> None:
  table = plain_table("run", "index", "steps", "card")
  for index, run in enumerate(runs):
    done = finished_card(run, cards) is not None
    table.add_row(run.name, str(index), str(run.steps), "there" if done else "")
  _console().print(table)


def _print_arms(recipe: Recipe, rows: list[ArmRow]) -> None:
  table = plain_table(
    "arm", "parameters", "active", "FLOPs/token", "held-out nats", "max vio.", "drops", "CPU s"
  )
  for row in rows:
    table.add_row(
      row.arm,
      compact(row.parameters),
      compact(row.active),
      compact(row.flops_per_token),
      loss_text(row),
      "" if row.max_violation is None else f"{row.max_violation:.3f}",
      "" if row.dropped_fraction is None else f"{100 * row.dropped_fraction:.1f} %",
      f"{row.cpu_seconds:.0f}",
    )
  print(f"\n{recipe.title} (matched by {recipe.matched})")
  _console().print(table)


def _print_findings(recipe: Recipe, profile: str, found: list[Finding]) -> None:
  if not found:
    print(f"--profile={profile} decides no claim of recipe {recipe.name}")
    return
  for finding in found:
    claim = finding.claim
    why = f" ({finding.why})" if finding.why else ""
    print(f"{finding.verdict}: {claim.text}{why}")
    if finding.measured is not None:
      print(f"  measured {finding.measured}, expected {expectation(claim)}")


def _console() -> Console:
  return Console(width=WIDTH, highlight=False, color_system=None)
