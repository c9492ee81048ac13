"""The training loop."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from moe_jax.data.builders import PreparedData
from moe_jax.data.loader import places_in_batch
from moe_jax.data.loader_state import check_state, restore_state, save_state
from moe_jax.errors import StoppedRun
from moe_jax.sharding.layout import Layout
from moe_jax.sharding.processes import failing_together, is_first_process
from moe_jax.training.alarms import Alarms
from moe_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.evaluate import Evaluator, InterruptedEvaluation
from moe_jax.training.events import Event
from moe_jax.training.fault_policy import FaultPolicy, GoBack
from moe_jax.training.faults_config import OnNonfinite, OnSpike
from moe_jax.training.goodput import Activity, Goodput
from moe_jax.training.interrupts import StopRequest
from moe_jax.training.nonfinite import FINITE, as_missing, check_finite
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.placed import own_rows, place_batch
from moe_jax.training.placement_balance import make_balancer
from moe_jax.training.profiling import Profiler
from moe_jax.training.run_outputs import Clock, RunOutputs, is_due, is_logged
from moe_jax.training.state import TrainState, abstract_state, init_state
from moe_jax.training.step import make_train_step
from moe_jax.training.stream import stream_of, training_batches
from moe_jax.training.tables import fill_tables
from moe_jax.training.watchdog import Watchdog
from moe_jax.training.writers import Row


def run_steps(
  config: ExperimentConfig,
  data: PreparedData,
  workdir: Path,
  layout: Layout | None = None,
  *,
  begun: float | None = None,
  on_sound: Callable[[], None] | None = None,
) -> tuple[TrainState, float]:
  """Trains to the last step, from the latest checkpoint if there is one.

  Everything a step does is a function of the seed, the step number and the state before it, so a
  run that was killed and started again writes the same metrics (but for the wall clock) and ends
  with the same parameters, bit for bit. On other devices, or in another number of processes, it
  does so up to the order in which numbers are summed. The first process alone writes metrics and
  shows progress; all of them must call this.

  Args:
    config: of the run.
    data: to train on.
    workdir: the run folder.
    layout: the devices; None = one.
    begun: `time.monotonic()` when the run was started, for the account of its time; None = now.
    on_sound: called in the first process once what earlier ones left is found sound, before it is
      changed by the first step.

  Returns:
    The last state, and the seconds spent on the run by this and earlier processes, as far as
    checkpoints tell.

  Raises:
    StoppedRun: a process was told to end; the step is saved.
    DivergedRun: its loss is not finite, or spikes, more often than its config allows.
    UserError: what an earlier process left of it is damaged.
  """
  with contextlib.ExitStack() as stack:
    training = _Training(config, data, workdir, layout, stack, Goodput(workdir, begun))
    training.restore()
    training.begin(on_sound)
    while not training.is_done():
      try:
        training.advance()
      except GoBack as fault:
        training.go_back(fault)
    return training.finish()


class _Training:
  """A run between two steps.

  Attributes:
    step: optimiser steps done.
  """

  def __init__(
    self,
    config: ExperimentConfig,
    data: PreparedData,
    workdir: Path,
    layout: Layout | None,
    stack: contextlib.ExitStack,
    goodput: Goodput,
  ):
    self._config, self._data, self._layout = config, data, layout
    self._workdir, self._stack, self._goodput = workdir, stack, goodput
    self._started, self._earlier = time.monotonic(), 0.0
    self._stop_request = stack.enter_context(StopRequest())
    self._optimizer = make_optimizer(config.optimizer, config.steps)
    self._train_step = make_train_step(config, self._optimizer, layout)
    self._balance = make_balancer(config, self._optimizer, layout)
    self._evaluator = Evaluator(config, data, layout, self._must_stop)
    self._rows, self._identity = own_rows(layout, config.batch_size), stream_of(config, data)
    self._checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint))
    self._watchdog = stack.enter_context(Watchdog(config.faults.watchdog_seconds, workdir))
    self._profiler = stack.enter_context(Profiler(config.log.profile, workdir))
    self._policy = FaultPolicy(config.faults)
    moe = config.model.moe
    self._alarms = Alarms(config.faults, 0 if moe is None else moe.routing.num_experts)
    self._calls = Activity.COMPILE
    self._rollbacks: list[Event] = []

  def restore(self, at_most: int | None = None) -> None:
    """Goes to the newest sound checkpoint, or to the beginning where there is none."""
    config = self._config
    template = abstract_state(
      config.model, self._optimizer, config.repair, self._layout, config.balance_placement
    )
    restored = self._checkpoints.restore_latest(template, at_most)
    self._batches = training_batches(config, self._data, self._rows)
    if restored is None:
      self.step, self._state, self._owed = 0, self._first_state(), None
      self._restore_faults({})
      return
    self.step, self._state, place = restored
    try:
      stream, self._earlier = place["stream"], float(place["wall_seconds"])
      check_state(self._batches, stream)
      if not 0 <= self._earlier < math.inf:
        raise ValueError(f"wall_seconds is {self._earlier}")
      self._owed = _owed_row(place, self.step)
      self._restore_faults(place.get("faults", {}))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
      reason = f"its place in the data is of another kind ({type(error).__name__}: {error})"
      raise DamagedCheckpoint(self._checkpoints.folder / str(self.step), reason) from error
    restore_state(self._batches, stream, self._identity)

  def begin(self, on_sound: Callable[[], None] | None) -> None:
    """Opens what the run writes; see `run_steps`."""
    self._outputs = self._open_outputs()
    with failing_together():
      if on_sound is not None and is_first_process():
        on_sound()
    self._clock, self._asked = Clock(self._config), self.step
    if self.step:
      self._outputs.say(f"resuming {self._workdir} at step {self.step}")
    self._outputs.events([{"event": "started", "step": self.step}], aloud=False)
    self._goodput.begin(self.step)

  def is_done(self) -> bool:
    """Tells whether all steps are trained, and all rows written."""
    return self.step >= self._config.steps and self._owed is None

  def advance(self) -> None:
    """Writes the row that an interrupted evaluation owes, or trains a step; does what is due then.

    Raises:
      GoBack: the run is to go back behind a step.
      StoppedRun: the run was told to end; the step is saved.
    """
    if self._owed is None:
      self._train()
    else:
      self._pay()

  def _train(self) -> None:
    config, step = self._config, self.step + 1
    self._profiler.before(step)
    with self._goodput.during(Activity.DATA):
      batch = next(self._batches)
      batch = batch if self._layout is None else place_batch(batch, self._layout, self._rows)
    with self._goodput.during(self._calls):
      self._state, metrics = self._train_step(self._state, batch)
    self._calls, self.step = Activity.STEP, step
    self._state = self._balance(self._state, step)
    self._policy.watch(step, metrics.pop(FINITE))
    self._profiler.after(step, metrics)
    stopping = self._must_stop()
    saving = stopping or config.checkpoint.is_due(step, config.steps)
    row = {}
    if saving or is_logged(step, config):
      bad = self._answer_faults()
      if is_logged(step, config):
        row = self._clock.row(step, metrics)
        if step in bad:
          row = as_missing(row)
        else:
          check_finite(step, row)
        # Before the evaluation, which tells them nothing, and may be left to another process.
        self._answer_alarms(self._alarms.read(row))
        try:
          row = self._log(row)
        except InterruptedEvaluation:
          stopping = saving = True
      if saving:
        self._save(metrics if step not in bad else {}, row.get("eval_loss"))
    self._watchdog.beat()
    self._goodput.end_step(step, write=saving)
    if stopping:
      self._stop()

  def _pay(self) -> None:
    """Evaluates what an earlier process was told to end in, and writes that step's row."""
    try:
      row = self._log(self._owed)
    except InterruptedEvaluation:
      self._stop()
    if self._config.checkpoint.is_due(self.step, self._config.steps):
      self._save({}, row.get("eval_loss"))

  def go_back(self, fault: GoBack) -> None:
    """Restores a checkpoint from before the fault, and passes over the batches up to it."""
    event, used = fault.event, self._policy.used
    batch = event["batch"]
    with self._goodput.during(Activity.INIT):
      self.restore(at_most=event["step"] - 1)
      for _ in range(batch - self.step - self._policy.passed):
        next(self._batches)
    self._policy.used, self._policy.passed = used, batch - self.step
    self._goodput.go_back(self.step)
    self._outputs.close()
    self._outputs = self._open_outputs()
    self._clock = Clock(self._config)
    self._rollbacks.append(event | {"restored": self.step})
    *again, last = [each for each in self._rollbacks if each["step"] > self.step]
    self._outputs.events(again, aloud=False)
    self._outputs.events([last])

  def finish(self) -> tuple[TrainState, float]:
    """Waits for the last checkpoint; returns the state, and the seconds that the run has taken."""
    with self._goodput.during(Activity.CHECKPOINT):
      self._checkpoints.wait()
    self._goodput.write()
    return self._state, self._seconds()

  def _open_outputs(self) -> RunOutputs:
    outputs = RunOutputs(self._config, self._workdir, self.step, owed=self._owed is not None)
    return self._stack.enter_context(outputs)

  def _must_stop(self) -> bool:
    # What processes agree on must grow from call to call, also where a run goes back.
    self._asked += 1
    return self._checkpoints.must_stop(self._asked) or bool(self._stop_request)

  def _answer_faults(self) -> list[int]:
    """Returns the bad steps since it last looked, when they have been dealt with."""
    bad = self._policy.settle()
    events = self._policy.answer(bad)
    for event in events:
      self._name_records(event)
    if events and self._config.faults.on_nonfinite == OnNonfinite.ROLLBACK:
      raise GoBack(events[0])
    self._outputs.events(events)
    return bad

  def _name_records(self, event: Event) -> None:
    """Tells an event which records its batch was made of."""
    event["records"] = places_in_batch(
      self._data.train,
      batch_size=self._config.batch_size,
      seed=self._config.seed,
      batch=event["batch"] - 1,
    )

  def _log(self, row: Row) -> Row:
    """Writes the row of a step with what is evaluated at it.

    Raises:
      InterruptedEvaluation: the run was told to end; the row is owed.
    """
    if is_due(self.step, self._config.eval.every, self._config.steps):
      self._owed = row
      with self._goodput.during(Activity.EVALUATION):
        found = _evaluate(self._evaluator, self._state)
      self._owed = None
      self._clock.restart(self.step)
      check_finite(self.step, found)
      row = row | found
    self._outputs.row(row)
    return row

  def _answer_alarms(self, events: list[Event]) -> None:
    spikes = [event for event in events if event["event"] == "loss_spike"]
    if spikes and self._config.faults.on_spike == OnSpike.ROLLBACK:
      event = self._policy.roll_back_from(spikes[0])
      self._name_records(event)
      raise GoBack(event)
    self._outputs.events(events)

  def _save(self, metrics: dict[str, jax.Array], heldout: float | None) -> None:
    check_finite(self.step, jax.device_get(metrics))
    with self._goodput.during(Activity.CHECKPOINT):
      self._outputs.sync()
      place = {
        "stream": save_state(self._batches, self._identity),
        "wall_seconds": self._seconds(),
        "owed": self._owed,
        "faults": self._policy.state() | {"alarms": self._alarms.state()},
      }
      self._checkpoints.save(self.step, self._state, place, heldout)

  def _stop(self) -> None:
    with self._goodput.during(Activity.CHECKPOINT):
      self._checkpoints.wait()
    self._outputs.events([{"event": "stopped", "step": self.step}], aloud=False)
    self._goodput.write()
    raise StoppedRun(
      f"this run was told to end (SIGTERM or SIGINT): step {self.step} is saved, and the same"
      " command goes on from there"
    )

  def _seconds(self) -> float:
    return self._earlier + time.monotonic() - self._started

  def _first_state(self) -> TrainState:
    config = self._config
    state = init_state(
      config.model,
      self._optimizer,
      config.seed,
      config.repair,
      self._layout,
      config.balance_placement,
    )
    return fill_tables(state, config.model, self._data.train)

  def _restore_faults(self, saved: dict[str, Any]) -> None:
    self._policy.restore(saved)
    self._alarms.restore(saved.get("alarms", {}))


def _owed_row(place: dict[str, Any], step: int) -> Row | None:
  """Returns the row of a step that was saved during its evaluation; None of any other."""
  row = place.get("owed")
  if row is None:
    return None
  numbers = jax.tree.leaves(row)
  if row["step"] != step or not all(isinstance(number, int | float) for number in numbers):
    raise ValueError(f"the row it owes is {row}")
  return row


def _evaluate(evaluator: Evaluator, state: TrainState) -> dict[str, float]:
  dropless, at_capacity = evaluator.both(state.model)
  row = {"eval_loss": dropless.loss, "eval_bits_per_byte": dropless.bits_per_byte}
  if dropless.accuracy is not None:
    row["eval_accuracy"] = dropless.accuracy
  if at_capacity is not None:
    row["eval_loss_at_capacity"] = at_capacity.loss
    row["eval_dropped_fraction_at_capacity"] = at_capacity.dropped_fraction
  return row
