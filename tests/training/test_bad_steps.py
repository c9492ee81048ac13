"""Steps that are not finite: undone on the device, counted, passed over; and alarms."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from training import tiny
from training.steps import fresh, initial_state, make_batch

from moe_jax.data.builders import prepare
from moe_jax.errors import UserError
from moe_jax.training import loop
from moe_jax.training.alarms import Alarms
from moe_jax.training.events import read_events
from moe_jax.training.faults_config import FaultsConfig
from moe_jax.training.goodput import Activity, Goodput
from moe_jax.training.loop import run_steps
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.step import make_train_step
from moe_jax.training.stream import training_batches

SMALL = dict(
  variant="dense",
  eval__every=100,
  model__segments=(("attention:dense", 1),),
  model__scan_unroll=1,
)


def rows(workdir) -> list[dict]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture(autouse=True)
def no_evaluation(monkeypatch):
  """Leaves out the evaluation after the last step, which takes longer than all of them."""
  monkeypatch.setattr(loop, "_evaluate", lambda *_: {"eval_loss": 1.0, "eval_bits_per_byte": 1.0})


class Poisoned:
  """The batches of a run, some of which (numbers from 1) make the loss NaN."""

  def __init__(self, iterator, bad):
    self._iterator, self._bad, self._count = iterator, bad, 0

  def __next__(self):
    self._count += 1
    factor = np.float32(np.nan if self._count in self._bad else 1)
    batch = next(self._iterator)
    return batch | {"loss_mask": batch["loss_mask"] * factor}

  def get_state(self):
    return {"count": self._count, "own": self._iterator.get_state()}

  def set_state(self, state):
    self._count = state["count"]
    self._iterator.set_state(state["own"])


@pytest.fixture
def poison(monkeypatch):
  make = loop.training_batches

  def at(*bad):
    monkeypatch.setattr(loop, "training_batches", lambda *args: Poisoned(make(*args), bad))

  return at


def trained(workdir, **overrides):
  workdir.mkdir(exist_ok=True)
  config = tiny.experiment(**SMALL | overrides)
  return run_steps(config, prepare(config.data), workdir)[0]


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_a_step_that_is_not_finite_changes_nothing_but_its_number():
  config = tiny.experiment(
    faults__on_nonfinite="skip",
    model__segments=(("attention:moe", 1),),
    model__scan_unroll=1,
    moe__bias_update="sign",
    moe__bias_rate=0.1,
  )
  optimizer = make_optimizer(config.optimizer, config.steps)
  state, step = initial_state(config), make_train_step(config, optimizer)
  good, bad = make_batch(0), make_batch(1)
  good, bad = ({**b, "loss_mask": b["loss_mask"].astype(np.float32)} for b in (good, bad))
  before, metrics = step(fresh(state), good)
  assert metrics["finite"]
  after, metrics = step(fresh(before), bad | {"loss_mask": bad["loss_mask"] * np.float32("nan")})
  assert not metrics["finite"]
  assert int(after.step) == int(before.step) + 1
  assert_equal(dataclasses.replace(after, step=before.step), before)
  moved, metrics = step(fresh(after), good)
  assert metrics["finite"]
  # The learning rate goes by the updates that were made.
  assert metrics["learning_rate"] == step(fresh(before), good)[1]["learning_rate"]
  assert int(moved.step) == 3


def test_skipped_batches_are_counted_and_named(tmp_path, poison):
  poison(2, 4)
  trained(tmp_path / "run", faults__on_nonfinite="skip", log__every=3, checkpoint__every=3)
  events = [e for e in read_events(tmp_path / "run") if e["event"] == "skipped_step"]
  assert [(e["step"], e["batch"], e["used"]) for e in events] == [(2, 2, 1), (4, 4, 2)]
  config = tiny.experiment(**SMALL)
  batches = training_batches(config, data := prepare(config.data))
  fourth = [next(batches) for _ in range(4)][-1]
  held = [data.train[place]["tokens"] for place in events[1]["records"]]
  np.testing.assert_array_equal(fourth["tokens"], held)


def test_the_row_of_a_skipped_step_holds_null(tmp_path, poison):
  poison(2)
  trained(tmp_path / "run", faults__on_nonfinite="skip", steps=3)
  losses = [row["loss"] for row in rows(tmp_path / "run")]
  assert losses[1] is None and np.isfinite([losses[0], losses[2]]).all()


def test_a_budget_that_is_used_up_ends_the_run_in_one_sentence(tmp_path, poison):
  poison(2, 4)
  with pytest.raises(UserError, match=r"at step 4 \(batch 4 .*faults.budget = 1 such"):
    trained(tmp_path / "run", faults__on_nonfinite="skip", faults__budget=1)


def test_stopping_names_the_first_bad_step_between_two_rows(tmp_path, poison):
  poison(2)
  with pytest.raises(UserError, match=r"not finite at step 2 \(batch 2 .*on_nonfinite = skip"):
    trained(tmp_path / "run", log__every=5, checkpoint__every=5)


def test_a_budget_holds_over_a_restart(tmp_path, poison):
  poison(2, 5)
  skip = dict(faults__on_nonfinite="skip", checkpoint__every=3)
  whole = trained(tmp_path / "whole", **skip)
  workdir = tmp_path / "cut"
  with pytest.raises(UserError, match="at step 5"):
    trained(workdir, **skip, faults__budget=1)
  assert_equal(trained(workdir, **skip), whole)
  assert rows(workdir) == rows(tmp_path / "whole")
  used = [e["used"] for e in read_events(workdir) if e["event"] == "skipped_step"]
  assert used == [1, 2]


def test_a_rollback_passes_over_the_batches_since_the_checkpoint(tmp_path, poison):
  poison(4)
  back = dict(faults__on_nonfinite="rollback", checkpoint__every=2)
  state = trained(tmp_path / "run", **back)
  assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
  (event,) = (e for e in read_events(tmp_path / "run") if e["event"] == "rolled_back")
  assert (event["step"], event["batch"], event["restored"]) == (4, 4, 2)
  # The same steps by hand: batches 1 and 2, then 5 to 8.
  config = tiny.experiment(**SMALL | back)
  data = prepare(config.data)
  optimizer = make_optimizer(config.optimizer, config.steps)
  expected, step = initial_state(config), make_train_step(config, optimizer)
  expected, batches = fresh(expected), training_batches(config, data)
  for number in range(1, 9):
    batch = next(batches)
    if number not in (3, 4):
      mask = batch["loss_mask"].astype(np.float32)
      expected, _ = step(expected, batch | {"loss_mask": mask})
  assert_equal(state, expected)


def test_restoring_for_a_rollback_is_not_counted_as_training(tmp_path, poison, monkeypatch):
  poison(4)
  counted, during = [], Goodput.during
  monkeypatch.setattr(Goodput, "during", lambda self, a: counted.append(a) or during(self, a))
  trained(tmp_path / "run", faults__on_nonfinite="rollback", checkpoint__every=2)
  assert counted.count(Activity.INIT) == 1


def test_two_rollbacks_to_the_beginning_stay_on_record(tmp_path, poison):
  poison(1, 3)
  trained(tmp_path / "run", faults__on_nonfinite="rollback", steps=4, checkpoint__every=4)
  events = [e for e in read_events(tmp_path / "run") if e["event"] == "rolled_back"]
  assert [(e["step"], e["batch"], e["restored"]) for e in events] == [(1, 1, 0), (2, 3, 0)]


@pytest.fixture
def spikes(monkeypatch):
  """Makes the logged loss of some batches (numbers from 1) ten times what it is."""
  make_batches, make_step, streams = loop.training_batches, loop.make_train_step, []

  def counted(*args):
    streams.append(Poisoned(make_batches(*args), ()))
    return streams[-1]

  def at(*bad):
    def make(*args):
      step = make_step(*args)

      def spiking(state, batch):
        state, metrics = step(state, batch)
        factor = 10.0 if streams[-1]._count in bad else 1.0
        return state, metrics | {"loss": factor * metrics["loss"]}

      return spiking

    monkeypatch.setattr(loop, "training_batches", counted)
    monkeypatch.setattr(loop, "make_train_step", make)

  return at


SPIKES = dict(checkpoint__every=2, faults__spike_window=2, faults__spike_ratio=2.0)


def test_a_spike_may_lead_back_and_past_its_batches(tmp_path, spikes, poison):
  spikes(4)
  state = trained(tmp_path / "run", faults__on_spike="rollback", **SPIKES)
  assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
  (event,) = (e for e in read_events(tmp_path / "run") if e["event"] == "spike_rolled_back")
  assert (event["step"], event["batch"], event["restored"], event["used"]) == (4, 4, 2, 1)
  assert event["loss"] > 2 * event["median"] and len(event["records"]) == 4
  # The run that goes back from the same step because it is not finite passes the same batches.
  spikes()
  poison(4)
  back = dict(faults__on_nonfinite="rollback", checkpoint__every=2)
  assert_equal(state, trained(tmp_path / "other", **back))


def test_a_spike_is_reported_and_no_more_unless_asked_for(tmp_path, spikes):
  spikes(4)
  trained(tmp_path / "run", **SPIKES)
  names = [event["event"] for event in read_events(tmp_path / "run")]
  assert "loss_spike" in names and "spike_rolled_back" not in names


def test_spikes_use_up_the_budget(tmp_path, spikes):
  spikes(3, 4, 5, 6)
  with pytest.raises(UserError, match="the loss spikes at step 3 .*budget = 1 such steps"):
    trained(tmp_path / "run", faults__on_spike="rollback", faults__budget=1, **SPIKES)


def row(step, loss=1.0, **more):
  return {"step": step, "loss": loss, **more}


def test_a_loss_spike_is_an_event_against_the_median_before_it():
  alarms = Alarms(FaultsConfig(spike_ratio=2.0, spike_window=4), 8)
  said = [alarms.read(row(i, loss)) for i, loss in enumerate([9.0, 1.0, 1.2, 2.5, 1.0], start=1)]
  assert said[:3] == [[], [], []] and said[4] == []
  assert said[3] == [{"event": "loss_spike", "step": 4, "loss": 2.5, "median": 1.2}]
  assert alarms.read(row(6, None)) == []


def test_a_collapse_is_said_once_when_it_lasts_and_a_restart_remembers():
  config = FaultsConfig(collapse_share=0.5, collapse_rows=2)
  alarms = Alarms(config, 8)

  def dead(number):
    return {"moe/layer_1/dead_experts": number, "moe/layer_1/max_violation": 3.0}

  assert alarms.read(row(1, **dead(5.0))) == []
  again = Alarms(config, 8)
  again.restore(json.loads(json.dumps(alarms.state())))
  (event,) = again.read(row(2, **dead(6.0)))
  assert (event["event"], event["layer"], event["dead_experts"]) == ("expert_collapse", 1, 6)
  assert again.read(row(3, **dead(6.0))) == []
  assert again.read(row(4, **dead(4.0))) == [] == again.read(row(5, **dead(5.0)))
  assert len(again.read(row(6, **dead(5.0)))) == 1


def test_a_layer_collapses_by_its_max_violation_too():
  config = FaultsConfig(collapse_violation=4.0, collapse_rows=2)
  alarms = Alarms(config, 8)

  def load(violation):
    return {"moe/layer_0/dead_experts": 0.0, "moe/layer_0/max_violation": violation}

  said = [alarms.read(row(i, **load(v))) for i, v in enumerate([5.0, 3.0, 5.0, 6.0, 7.0])]
  assert [len(events) for events in said] == [0, 0, 0, 1, 0]
  assert said[3][0]["max_violation"] == 6.0
  off = Alarms(FaultsConfig(collapse_rows=1), 8)
  assert off.read(row(1, **load(7.0))) == []


@pytest.mark.parametrize(
  ("fields", "fragment"),
  [
    (dict(on_spike="rolback"), "did you mean 'rollback'"),
    (dict(on_spike="rollback", spike_ratio=0.0), "no loss would be a spike"),
    (dict(collapse_violation=-1.0), "collapse_violation = -1"),
    (dict(on_nonfinite="skp"), "did you mean 'skip'"),
    (dict(budget=-1), "budget = -1"),
    (dict(spike_ratio=0.9), "every loss would be a spike"),
    (dict(collapse_share=1.5), "at most 1"),
    (dict(watchdog_seconds=float("nan")), "watchdog_seconds"),
  ],
)
def test_faults_that_make_no_sense_are_refused(fields, fragment):
  with pytest.raises(UserError, match=fragment):
    FaultsConfig(**fields)
