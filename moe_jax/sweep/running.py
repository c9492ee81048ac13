"""Trains one run of a sweep and writes its card."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from moe_jax.data.builders import PreparedData, prepare
from moe_jax.errors import DivergedRun, UserError
from moe_jax.planning.count import count_parameters
from moe_jax.planning.flops import training_flops_per_token
from moe_jax.sweep.cards import Card, card_file, read_card, write_card
from moe_jax.sweep.measuring import curves, domain_texts, heldout
from moe_jax.sweep.recipe import Run
from moe_jax.sweep.routing_history import routing_history
from moe_jax.sweep.upcycled_start import branch, write_start
from moe_jax.training.config import ExperimentConfig, experiment_from
from moe_jax.training.loop import run_steps
from moe_jax.training.origin import origin_here
from moe_jax.training.run_folder import claim_run, write_json

_COST_FILE = "cost.json"


def run_folder(run: Run, workdir: Path) -> Path:
  """Returns the folder of a run, named by its config: recipes share what they have alike."""
  return workdir / "trained" / run.digest


def finished_card(run: Run, cards: Path) -> Card | None:
  """Returns the card of a run, None if it is still to be made.

  Raises:
    UserError: the card is damaged, or is of another config.
  """
  path = card_file(cards, run.arm, run.seed)
  if not path.exists():
    return None
  card = read_card(path)
  digest = run.digest
  if card.get("config_digest") != digest:
    raise UserError(
      f"{path} is the card of another config than recipe {run.recipe.name} gives"
      f" ({card.get('config_digest')}, expected {digest}); move it away to run this one"
    )
  return card


def run_and_write(run: Run, workdir: Path, cards: Path) -> Card:
  """Trains a run to the end, from its last checkpoint if there is one, and writes its card.

  Args:
    run: of a recipe.
    workdir: folder of all runs, of any recipe.
    cards: folder of all cards.

  Raises:
    UserError: the config is refused, another process is at this run, or the run that it starts
      from is still to be done.
  """
  mapping, folder = run.mapping(), run_folder(run, workdir)
  config = experiment_from(mapping)
  data = prepare(config.data)
  with claim_run(folder, mapping):
    if run.start is not None:
      write_start(run.start, run_folder(run.source, workdir), config, data, folder)
    found = _trained_and_measured(run, config, data, folder)
    card = {
      "recipe": run.recipe.name,
      "arm": run.arm,
      "seed": run.seed,
      "config_digest": run.digest,
      **_size(config),
      **found,
      "cpu_seconds": _cpu_seconds(folder),
      "origin": _origin(data.fingerprint),
      "config": mapping,
    }
    write_card(card_file(cards, run.arm, run.seed), card)
  return card


def _trained_and_measured(
  run: Run, config: ExperimentConfig, data: PreparedData, folder: Path
) -> dict[str, Any]:
  """Returns what a run came to: of one that diverged, no more than that."""
  try:
    with _cpu_time_added(folder):
      state, wall = run_steps(config, data, folder)
  except DivergedRun as error:
    return {"diverged": 1, "why": str(error)}
  found = branch(folder) if run.start is not None else {}
  found |= heldout(config, data, state.model, run.recipe.domains, run.recipe.interventions)
  if run.recipe.history:
    found["history"] = routing_history(config, folder, domain_texts(config, run.recipe.domains))
  return {"diverged": 0, **curves(folder), **found, "wall_seconds": wall}


@contextlib.contextmanager
def _cpu_time_added(folder: Path) -> Iterator[None]:
  """Adds the CPU time of training to that of earlier processes; that of a killed one is lost."""
  started = time.process_time()
  try:
    yield
  finally:
    seconds = _cpu_seconds(folder) + time.process_time() - started
    write_json(folder / _COST_FILE, {"cpu_seconds": seconds})


def _cpu_seconds(folder: Path) -> float:
  path = folder / _COST_FILE
  return json.loads(path.read_bytes())["cpu_seconds"] if path.exists() else 0.0


def _size(config: ExperimentConfig) -> dict[str, Any]:
  count = count_parameters(config.model)
  length = config.data.sequence_length
  return {
    "steps": config.steps,
    "tokens": config.steps * config.batch_size * length,
    "parameters": {"total": count.total, "active": count.active},
    "flops_per_token": training_flops_per_token(config.model, length),
  }


def _origin(fingerprint: str) -> dict[str, Any]:
  """Returns where the card was made; of the packages, those that decide numbers."""
  origin = dataclasses.asdict(origin_here(fingerprint))
  names = ("python", "jax", "jaxlib", "flax", "optax", "numpy")
  packages = {name: origin["packages"][name] for name in names}
  return origin | {"packages": packages, "threads": _threads()}


def _threads() -> int | None:
  """Returns the cores that this process may use, None where a GPU or TPU does the work."""
  return len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else None
