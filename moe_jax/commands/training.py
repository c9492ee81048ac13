"""The command `moe-jax train`."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_jax.analysis.report import write_report
from moe_jax.commands.summary import summarize
from moe_jax.data.builders import prepare
from moe_jax.data.loader import steps_per_epoch
from moe_jax.errors import UserError
from moe_jax.training.config import ExperimentConfig, experiment_from
from moe_jax.training.loop import run_steps
from moe_jax.training.run_folder import (
  SUMMARY_FILE,
  check_run,
  claim_run,
  damaged_summary,
  read_summary,
  write_json,
)
from moe_jax.training.writers import check_writers


def train(args: SimpleNamespace) -> None:
  """Trains or resumes, then evaluates, samples and writes the report.

  What the user may have got wrong is checked before the run folder is touched. A run that is
  complete is not trained again: its results are shown, and its report is written anew.
  """
  workdir = Path(args.workdir)
  mapping = args.config.to_dict()
  config = experiment_from(mapping)
  _check_selection(config)
  check_run(workdir, mapping)
  check_writers(config.log)
  data = prepare(config.data)
  steps_per_epoch(data.train, config.batch_size)
  with claim_run(workdir, mapping):
    if not (workdir / SUMMARY_FILE).exists():
      state, wall_seconds = run_steps(config, data, workdir)
      summary = summarize(config, data, state.model, workdir)
      write_json(workdir / SUMMARY_FILE, {**summary, "wall_seconds": wall_seconds})
    print(_results(read_summary(workdir), workdir, write_report(workdir)))


def _check_selection(config: ExperimentConfig) -> None:
  """Refuses a selection that only the config file registers: who reads the run does not run it."""
  if config.model.moe is None:
    return
  routing = config.model.moe.routing
  if routing.selector.function.__module__ not in sys.modules:
    raise UserError(
      f"selection = {routing.selection} is registered by the config file itself, which eval, trace"
      " and generate do not run; put it into a module of its own and name that in config.imports"
    )


def _results(summary: dict[str, Any], workdir: Path, report: Path) -> str:
  try:
    lines = _lines(summary)
  except (KeyError, TypeError, ValueError) as error:
    raise damaged_summary(workdir, error) from error
  return "\n".join([*lines, "", f"metrics, checkpoints and report in {workdir}; open {report}"])


def _lines(summary: dict[str, Any]) -> list[str]:
  held_out, compressors = summary["eval"], summary["compressors"]
  sample, parameters = summary["sample"], summary["parameters"]
  return [
    "",
    f"held-out bits per byte   {held_out['bits_per_byte']:.3f}   ({held_out['loss']:.4f} nats per"
    " token, dropless)",
    f"  xz -9, alone           {compressors['xz']:.3f}",
    f"  xz -9, primed          {compressors['xz_primed']:.3f}   (after the training text)",
    f"parameters               {parameters['total']:,} total, {parameters['active']:,} active",
    "",
    f"sample (temperature {sample['temperature']}):",
    f"  {sample['prompt']}|{sample['text']}",
  ]
