"""Runs that start from a checkpoint of another run, its dense networks made into experts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from moe_jax.analysis.preservation import preservation
from moe_jax.convert.surgery import UpcycleOptions, upcycling
from moe_jax.data.builders import PreparedData
from moe_jax.data.loader import eval_batches
from moe_jax.errors import UserError
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.run_folder import METRICS_FILE, write_json
from moe_jax.training.saved_run import load_state
from moe_jax.training.step_folders import FOLDER, saved_steps
from moe_jax.training.transplant import transplant
from moe_jax.training.writers import rows_until

_BATCHES = 8
_BRANCH_FILE = "branch.json"


@dataclasses.dataclass(frozen=True)
class UpcycledFrom:
  """Where an arm starts: at a checkpoint of a dense arm, at its step, schedule and place in data.

  Attributes:
    arm: the dense one, whose run of the same seed is upcycled; its `checkpoint.at` has the step.
    step: of its checkpoint.
    options: how experts come from the dense networks.
  """

  arm: str
  step: int
  options: UpcycleOptions = UpcycleOptions()


def write_start(
  start: UpcycledFrom, source: Path, config: ExperimentConfig, data: PreparedData, folder: Path
) -> None:
  """Writes the checkpoint that a run goes on from, unless there is one.

  The rows of the dense steps become the first ones of its metrics.

  Args:
    start: what is upcycled, and how.
    source: folder of the dense run.
    config: of the upcycled run.
    data: of both.
    folder: of the upcycled run, which this process has claimed.

  Raises:
    UserError: there is no such checkpoint, or the model is not the dense one upcycled.
  """
  if saved_steps(folder / FOLDER):
    return
  if start.step not in saved_steps(source / FOLDER):
    raise UserError(
      f"{source} has no checkpoint of step {start.step}, from which this run starts; first do the"
      f" run of arm {start.arm} with the same seed and --workdir (its card, if there is one, is of"
      " another folder: move it away)"
    )
  old, state, place = load_state(source, start.step)
  operation = upcycling(old.model, config.model, start.options, jax.random.key(config.seed))
  upcycled = transplant(state, operation, config)
  write_json(folder / _BRANCH_FILE, _compared((old, state), (config, upcycled), data))
  rows = [line for _, line in rows_until(source / METRICS_FILE, start.step)]
  (folder / METRICS_FILE).write_bytes(b"".join(rows))
  with Checkpoints(folder, config.checkpoint) as checkpoints:
    checkpoints.save(start.step, upcycled, place)
    checkpoints.wait()


def branch(folder: Path) -> dict[str, Any]:
  """Returns how far the model still was the dense one when the run started, for its card."""
  return {"branch": json.loads((folder / _BRANCH_FILE).read_bytes())}


def _compared(before: tuple, after: tuple, data: PreparedData) -> dict[str, Any]:
  """Compares the models before and after on the first held-out batches."""
  batches = eval_batches(data.heldout, after[0].batch_size)
  some = [batch for batch, _ in zip(batches, range(_BATCHES), strict=False)]
  models = [(config.model, state.model) for config, state in (before, after)]
  found = preservation(*models, some)
  return {**dataclasses.asdict(found), "relative_difference": found.relative_difference}
