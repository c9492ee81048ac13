"""What `moe-jax convert upcycle | prune | merge | grow` writes: a run folder to go on with."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_jax.analysis.preservation import Preservation, preservation
from moe_jax.choices import as_choice
from moe_jax.commands.surgery_source import Source, beginning
from moe_jax.config.load import override
from moe_jax.convert.surgery import Operation
from moe_jax.errors import UserError
from moe_jax.models import ModelConfig
from moe_jax.moe.options import Overflow
from moe_jax.new_folder import check_free
from moe_jax.planning.count import count_parameters
from moe_jax.training.config import ExperimentConfig, experiment_from
from moe_jax.training.evaluate import at_training_capacity
from moe_jax.training.new_run import CONFIG_SOURCE, config_fields, write_run
from moe_jax.training.state import TrainState
from moe_jax.training.step import make_eval_step
from moe_jax.training.stream import stream_of
from moe_jax.training.tables import fill_tables
from moe_jax.training.template import full_config
from moe_jax.training.transplant import Moments, Schedule, transplant

NOTE_FILE = "surgery.json"


@dataclasses.dataclass(frozen=True)
class Made:
  """One request, as far as it does not depend on what --set changes.

  Attributes:
    name: of the command.
    model: the target's config.
    operation: from the target's final config to what makes it.
    finished: from the target's config after --set to its final one.
    approximations: from the final config to why the function is not preserved exactly; None where
      nothing is promised.
  """

  name: str
  model: ModelConfig
  operation: Callable[[ModelConfig], Operation]
  finished: Callable[[ModelConfig], ModelConfig]
  approximations: Callable[[ModelConfig], list[str]] | None


def check_request(args: SimpleNamespace) -> None:
  """Refuses what can be refused before a checkpoint is read.

  Raises:
    UserError: a target that is taken, a word that is no choice, or no batch to look at.
  """
  check_free(Path(args.out), "--out=")
  as_choice(Moments, "moments", args.moments)
  as_choice(Schedule, "schedule", args.schedule)
  if args.batches < 1:
    raise UserError(f"--batches={args.batches} is refused: it must be at least 1")


def finish(args: SimpleNamespace, source: Source, made: Made) -> None:
  """Carries the request out, measures what it did, writes the run folder and tells.

  Raises:
    UserError: a target that its config or its stream of data makes impossible.
  """
  config = _target_config(source.config, made, args.set)
  schedule = Schedule(args.schedule)
  _check_stream(source, config, schedule)
  state = transplant(
    source.state,
    made.operation(config.model),
    config,
    moments=Moments(args.moments),
    schedule=schedule,
  )
  if made.name == "upcycle":
    state = fill_tables(state, config.model, source.data.train)
  note = _note(args, source, made, config, state)
  goes_on = schedule == Schedule.KEEP and source.place is not None
  write_run(
    Path(args.out),
    config,
    state,
    source.place if goes_on else beginning(config, source.data),
    title=f"The run that moe-jax convert {made.name} made of {source.path.name}.",
    metrics=source.metrics if goes_on else "",
    notes={NOTE_FILE: note},
  )
  print(json.dumps(note) if args.json else _told(note, Path(args.out)))


def _target_config(old: ExperimentConfig, made: Made, changes: tuple[str, ...]) -> ExperimentConfig:
  """Returns the target's config: the source's, with the new model and what --set changes."""
  fields = full_config(config_fields(dataclasses.replace(old, model=made.model)))
  for change in changes:
    name, equals, text = change.partition("=")
    if not equals:
      raise UserError(f"--set={change} is no FIELD=VALUE, such as steps=400 or moe.dispatch=einsum")
    override(fields, name.removeprefix("config."), text)
  config = experiment_from(fields.to_dict())
  return dataclasses.replace(config, model=made.finished(config.model))


def _check_stream(source: Source, config: ExperimentConfig, schedule: Schedule) -> None:
  """Refuses a run that cannot go on where the source stands."""
  if schedule == Schedule.RESET or source.place is None:
    return
  old, step = source.config, int(source.state.step)
  if config.steps <= step:
    raise UserError(
      f"steps = {config.steps} is refused: the source stands at step {step} and none would follow;"
      " use --set=steps=N with a larger N, or --schedule=reset"
    )
  same_stream = config.data == old.data and stream_of(config, source.data) == stream_of(
    old, source.data
  )
  same_rows = (config.log.every, config.eval.every) == (old.log.every, old.eval.every)
  if not (same_stream and same_rows):
    raise UserError(
      "--set changes data, batch_size, seed, log.every or eval.every, on which the source's place"
      " in the data and its metrics rest; leave them, or use --schedule=reset"
    )


def _note(
  args: SimpleNamespace, source: Source, made: Made, config: ExperimentConfig, state: TrainState
) -> dict[str, Any]:
  """Measures the target against the source; returns what is kept and shown of the operation."""
  batches = source.batches(args.batches)
  found = preservation(
    (source.config.model, source.state.model), (config.model, state.model), batches
  )
  old, new = count_parameters(source.config.model), count_parameters(config.model)
  reasons = None if made.approximations is None else made.approximations(config.model)
  return {
    "operation": made.name,
    "source": str(source.path),
    "source_step": int(source.state.step),
    "step": int(state.step),
    "options": {name: value for name, value in vars(args).items() if name != "json"},
    "parameters": {"before": old.total, "after": new.total},
    "active_parameters": {"before": old.active, "after": new.active},
    "step_0": _figures(found),
    "approximations": reasons,
    "at_training_capacity": _at_capacity(config.model, state, batches, found),
  }


def _figures(found: Preservation) -> dict[str, Any]:
  return {
    **dataclasses.asdict(found),
    "relative_difference": found.relative_difference,
    "loss_difference": found.loss_after - found.loss_before,
  }


def _at_capacity(
  model: ModelConfig, state: TrainState, batches, dropless: Preservation
) -> dict[str, float]:
  """Returns loss and drops with the slots of training, which the first steps will see."""
  if model.moe.routing.overflow == Overflow.DROPLESS:
    return {"loss": dropless.loss_after, "dropped_fraction": 0.0}
  step = make_eval_step(at_training_capacity(model))
  sums = [step(state.model, batch) for batch in batches]
  total = {name: sum(float(each[name]) for each in sums) for name in sums[0]}
  return {
    "loss": total["nll"] / total["targets"],
    "dropped_fraction": total["dropped"] / max(total["asked"], 1.0),
  }


def _told(note: dict[str, Any], out: Path) -> str:
  """Returns what the command prints."""
  found, parameters, slots = note["step_0"], note["parameters"], note["at_training_capacity"]
  reasons = note["approximations"]
  promise = [] if reasons is None else [f"  {_promise(reasons)}"]
  return "\n".join(
    [
      f"{note['operation']} of {note['source']} at step {note['source_step']}:"
      f" {parameters['before']:,} -> {parameters['after']:,} parameters",
      f"on {found['tokens']:,} held-out tokens, dropless:",
      f"  largest difference of a logit  {found['max_logit_difference']:.3g}, relative to the"
      f" largest logit {found['relative_difference']:.3g}",
      f"  KL(before || after)            {found['kl']:.3g} nats per token",
      f"  loss                           {found['loss_before']:.6f} -> {found['loss_after']:.6f}"
      f" nats per token ({found['loss_difference']:+.3g})",
      f"with the slots of training       {slots['loss']:.6f} nats per token,"
      f" {100 * slots['dropped_fraction']:.2f} % of assignments dropped",
      *promise,
      "",
      f"{out} at step {note['step']}; go on with",
      f"  moe-jax train --config={out / CONFIG_SOURCE} --workdir={out}",
    ]
  )


def _promise(reasons: list[str]) -> str:
  if not reasons:
    return "the function is preserved up to rounding"
  return f"the function is preserved approximately: {'; '.join(reasons)}"
