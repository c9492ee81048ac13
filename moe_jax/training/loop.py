"""The training loop."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.data.builders import PreparedData
from moe_jax.data.loader import train_iterator
from moe_jax.data.loader_state import StreamIdentity, restore_state, save_state
from moe_jax.errors import UserError
from moe_jax.training.checkpoint import Checkpoints, damaged
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.evaluate import Evaluator
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import TrainState, abstract_state, init_state
from moe_jax.training.step import make_train_step
from moe_jax.training.tables import fill_tables
from moe_jax.training.writers import Progress, check_rows, open_writers


def run_steps(
  config: ExperimentConfig, data: PreparedData, workdir: Path
) -> tuple[TrainState, float]:
  """Trains to the last step, from the latest checkpoint if there is one.

  Everything a step does is a function of the seed, the step number and the state before it, so a
  run that was killed and started again writes the same metrics (but for the wall clock) and ends
  with the same parameters, bit for bit.

  Returns:
    The last state, and the seconds spent on the run by this and earlier processes, as far as
    checkpoints tell.

  Raises:
    UserError: the run has diverged, or what an earlier process left of it is damaged.
  """
  started = time.monotonic()
  optimizer = make_optimizer(config.optimizer, config.steps)
  train_step = make_train_step(config, optimizer)
  evaluator = Evaluator(config, data)
  identity = StreamIdentity(data.fingerprint, config.batch_size, config.seed)
  batches = train_iterator(
    data.train, batch_size=config.batch_size, seed=config.seed, transform=config.pair_maker
  )

  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint))
    state, first, earlier = _restore(config, optimizer, checkpoints, batches, identity)
    if state is None:
      state = fill_tables(
        init_state(config.model, optimizer, config.seed, config.repair), config.model, data.train
      )
    check_rows(workdir, first, (s for s in range(1, first + 1) if _is_logged(s, config)))
    writers = [
      stack.enter_context(contextlib.closing(w)) for w in open_writers(config.log, workdir, first)
    ]
    progress = stack.enter_context(contextlib.closing(Progress(first, config.steps, workdir.name)))
    if first:
      progress.say(f"resuming {workdir} at step {first}")
    clock = _Clock(config)
    for step in range(first + 1, config.steps + 1):
      state, metrics = train_step(state, next(batches))
      saving = _is_due(step, config.checkpoint.every, config.steps)
      if _is_logged(step, config):
        evaluating = _is_due(step, config.eval.every, config.steps)
        row = clock.row(step, metrics)
        if evaluating:
          row |= _evaluate(evaluator, state)
          clock.restart(step)
        check_finite(step, row)
        for writer in writers:
          writer.write(row)
        progress.update(row)
      if saving:
        check_finite(step, jax.device_get(metrics))
        for writer in writers:
          writer.sync()
        seconds = earlier + time.monotonic() - started
        place = {"stream": save_state(batches, identity), "wall_seconds": seconds}
        checkpoints.save(step, state, place)
  return state, earlier + time.monotonic() - started


def _is_due(step: int, every: int, last: int) -> bool:
  return step == last or step % every == 0


def _is_logged(step: int, config: ExperimentConfig) -> bool:
  return any(_is_due(step, every, config.steps) for every in (config.eval.every, config.log.every))


class _Clock:
  """Turns a step's metrics into a row, with the speed since the last one."""

  def __init__(self, config: ExperimentConfig):
    self._tokens_per_step = config.batch_size * config.data.sequence_length
    self._step, self._time = None, None

  def row(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, Any]:
    """Fetches the metrics, which waits for the step, and reads the clock."""
    values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
    now = time.monotonic()
    speed = None
    # The first interval holds the compilation: it has no speed.
    if self._step is not None:
      speed = (step - self._step) * self._tokens_per_step / (now - self._time)
    self._step, self._time = step, now
    return {
      "step": step,
      **values,
      "tokens": step * self._tokens_per_step,
      "tokens_per_second": speed,
    }

  def restart(self, step: int) -> None:
    """Leaves the time since the last row, spent on evaluation, out of the next interval."""
    self._step, self._time = step, time.monotonic()


def _restore(config, optimizer, checkpoints, batches, identity):
  """Returns (state, steps done, seconds they took); the state is None without a checkpoint."""
  step = checkpoints.latest_step()
  if step is None:
    return None, 0, 0.0
  template = abstract_state(config.model, optimizer, config.repair)
  state, place = checkpoints.restore(step, template)
  try:
    stream, seconds = place["stream"], float(place["wall_seconds"])
  except (KeyError, TypeError, ValueError) as error:
    raise damaged(checkpoints.folder / str(step), error) from error
  restore_state(batches, stream, identity)
  return state, step, seconds


def check_finite(step: int, metrics: Mapping[str, Any]) -> None:
  """Stops a run that has diverged, before a row or a checkpoint of it is written.

  Raises:
    UserError: a metric, or an element of one, is not finite; names the first.
  """
  for name, value in metrics.items():
    values = np.ravel([] if value is None else value)
    faults = values[~np.isfinite(values)]
    if faults.size:
      raise UserError(
        f"{name} is {faults[0]} at step {step}: the run has diverged; lower"
        " optimizer.learning_rate or optimizer.clip_norm and start in a new workdir"
      )


def _evaluate(evaluator: Evaluator, state: TrainState) -> dict[str, float]:
  dropless = evaluator.dropless(state.model)
  row = {"eval_loss": dropless.loss, "eval_bits_per_byte": dropless.bits_per_byte}
  if at_capacity := evaluator.at_training_capacity(state.model):
    row["eval_loss_at_capacity"] = at_capacity.loss
    row["eval_dropped_fraction_at_capacity"] = at_capacity.dropped_fraction
  return row
