"""The command `moe-jax train`."""

import contextlib
import functools
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from moe_jax.analysis.report import write_report
from moe_jax.commands.replaying import compare_origin, config_to_replay
from moe_jax.commands.summary import summarize
from moe_jax.data.builders import PreparedData, prepare
from moe_jax.data.loader import steps_per_epoch
from moe_jax.errors import UserError
from moe_jax.sharding.layout import Layout, make_layout
from moe_jax.sharding.processes import (
  failing_together,
  first_process_says,
  is_first_process,
  joined_processes,
)
from moe_jax.training.config import ExperimentConfig, experiment_from
from moe_jax.training.goodput import in_words, read_goodput
from moe_jax.training.loop import run_steps
from moe_jax.training.origin import Origin, origin_here, record_origin
from moe_jax.training.placed import check_run_fits, on_one_device
from moe_jax.training.profiling import nothing_to_trace
from moe_jax.training.run_folder import (
  SUMMARY_FILE,
  check_joined_run,
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
  complete is not trained again: its results are shown, and its report is written anew. Of several
  processes the first holds the run folder and writes, and all of them train.
  """
  begun = time.monotonic()
  workdir, replayed = Path(args.workdir), None if args.replay is None else Path(args.replay)
  mapping = args.config.to_dict() if replayed is None else config_to_replay(replayed, workdir)
  joined = joined_processes(args.coordinator, args.num_processes, args.process_id)
  with nothing_to_trace(), joined:
    with failing_together():
      config, data, layout = _checked(mapping, workdir)
      origin = origin_here(data.fingerprint)
      if replayed is not None:
        compare_origin(replayed, origin)
    with contextlib.ExitStack() as stack:
      with failing_together():
        if is_first_process():
          stack.enter_context(claim_run(workdir, mapping))
      with failing_together():
        if not is_first_process():
          check_joined_run(workdir, mapping)
      if not first_process_says((workdir / SUMMARY_FILE).exists()):
        _run(config, data, layout, workdir, origin, begun)
      if is_first_process():
        print(_results(read_summary(workdir), workdir, write_report(workdir)))


def _checked(
  mapping: dict[str, Any], workdir: Path
) -> tuple[ExperimentConfig, PreparedData, Layout | None]:
  """Returns what a run is made of, all that can be refused of it being right."""
  config = experiment_from(mapping)
  _check_selection(config)
  check_run(workdir, mapping)
  check_writers(config.log)
  data = prepare(config.data)
  steps_per_epoch(data.train, config.batch_size)
  layout = make_layout(config.sharding, jax.devices())
  if layout is not None:
    check_run_fits(config, layout)
  elif jax.process_count() > 1:
    raise UserError(
      f"config.sharding asks for one device, and {jax.process_count()} processes with"
      f" {jax.device_count()} devices have joined: give sizes whose product is"
      f" {jax.device_count()}, for example config.sharding.data = -1"
    )
  return config, data, layout


def _run(
  config: ExperimentConfig,
  data: PreparedData,
  layout: Layout | None,
  workdir: Path,
  origin: Origin,
  begun: float,
) -> None:
  """Trains to the end; the first process then writes the summary."""
  record = functools.partial(record_origin, workdir, origin)
  state, wall_seconds = run_steps(config, data, workdir, layout, begun=begun, on_sound=record)
  model = on_one_device(state.model, layout)
  if is_first_process():
    summary = summarize(config, data, model, workdir)
    write_json(workdir / SUMMARY_FILE, {**summary, "wall_seconds": wall_seconds})


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
  if account := read_goodput(workdir):
    lines += ["", f"goodput                  {in_words(account)}"]
  return "\n".join([*lines, "", f"metrics, checkpoints and report in {workdir}; open {report}"])


def _lines(summary: dict[str, Any]) -> list[str]:
  held_out, compressors = summary["eval"], summary["compressors"]
  sample, parameters = summary["sample"], summary["parameters"]
  accuracy = held_out.get("accuracy")
  right = [] if accuracy is None else [f"held-out images right    {100 * accuracy:.2f} %"]
  return [
    "",
    *right,
    f"held-out bits per byte   {held_out['bits_per_byte']:.3f}   ({held_out['loss']:.4f} nats per"
    " token, dropless)",
    f"  xz -9, alone           {compressors['xz']:.3f}",
    f"  xz -9, primed          {compressors['xz_primed']:.3f}   (after the training text)",
    f"parameters               {parameters['total']:,} total, {parameters['active']:,} active",
    "",
    f"sample (temperature {sample['temperature']}):",
    f"  {sample['prompt']}|{sample['text']}",
  ]
