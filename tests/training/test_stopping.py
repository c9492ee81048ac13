"""Signals, a hung step, a full disk: a run ends saved, or says why in one sentence."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from moe_jax.cli import main
from moe_jax.commands.supervise import _Supervisor
from moe_jax.data.builders import prepare
from moe_jax.data.loader import places_in_batch
from moe_jax.data.shards import Records
from moe_jax.errors import EXIT_AGAIN, EXIT_HUNG, StoppedRun, UserError
from moe_jax.training import loop
from moe_jax.training.append_only import LineFile
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.evaluate import InterruptedEvaluation
from moe_jax.training.events import EventLog, read_events
from moe_jax.training.goodput import Activity, account, read_goodput
from moe_jax.training.interrupts import StopRequest
from moe_jax.training.loop import run_steps
from moe_jax.training.manifest import read_manifest
from moe_jax.training.step_folders import saved_steps
from moe_jax.training.writers import JsonLinesWriter

SMALL = dict(
  variant="dense",
  eval__every=100,
  checkpoint__every=100,
  model__segments=(("attention:dense", 1),),
  model__scan_unroll=1,
)

HANG = """
import sys, time
from pathlib import Path
from moe_jax.training.watchdog import Watchdog
with Watchdog(0.2, Path(sys.argv[1])) as dog:
  time.sleep(0.4)  # before the first beat nothing is watched
  dog.beat()
  def wait_for_ever(): time.sleep(60)
  wait_for_ever()
"""


def rows(workdir) -> list[dict]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture(autouse=True)
def no_evaluation(monkeypatch):
  """Leaves out the evaluation after the last step, which takes longer than all of them."""
  monkeypatch.setattr(loop, "_evaluate", lambda *_: {"eval_loss": 1.0, "eval_bits_per_byte": 1.0})


def signalling(monkeypatch, step: int, number: int) -> None:
  """Makes a run of this process send itself a signal while it trains a step."""
  save = loop.training_batches

  def batches(*args):
    iterator, count = save(*args), 0

    class Counting:
      def __next__(self):
        nonlocal count
        count += 1
        if count == step:
          os.kill(os.getpid(), number)
        return next(iterator)

      get_state = iterator.get_state
      set_state = iterator.set_state

    return Counting()

  monkeypatch.setattr(loop, "training_batches", batches)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_saved_and_the_same_command_goes_on(
  number, tmp_path, monkeypatch, capsys
):
  words = tiny.command(tmp_path / "run", **SMALL)
  with monkeypatch.context() as patch:
    signalling(patch, 3, number)
    assert main(words) == EXIT_AGAIN == 75
  said = capsys.readouterr().err
  assert "step 3 is saved, and the same command goes on" in said and said.count("\n") == 1
  assert saved_steps(tmp_path / "run" / "checkpoints") == [3]
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  config, other = tiny.experiment(**SMALL), tmp_path / "whole"
  other.mkdir()
  run_steps(config, prepare(config.data), tmp_path / "run")
  run_steps(config, prepare(config.data), other)
  assert rows(tmp_path / "run") == rows(other)
  assert [e["event"] for e in read_events(tmp_path / "run")] == ["started", "stopped", "started"]


def interrupt_evaluation(patch, step: int) -> None:
  """Makes a run of this process send itself SIGTERM while it evaluates a step."""
  evaluate = loop._evaluate

  def interrupted(evaluator, state):
    if int(state.step) == step:
      os.kill(os.getpid(), signal.SIGTERM)
    if evaluator._must_end():
      raise InterruptedEvaluation
    return evaluate(evaluator, state)

  patch.setattr(loop, "_evaluate", interrupted)


@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_in_an_evaluation_leaves_its_row_to_the_next_start(step, tmp_path, monkeypatch):
  chosen = SMALL | dict(eval__every=3, checkpoint__every=3, checkpoint__keep_best=2)
  config, run, other = tiny.experiment(**chosen), tmp_path / "run", tmp_path / "whole"
  data = prepare(config.data)
  for folder in (run, other):
    folder.mkdir()
  run_steps(config, data, other)
  # The second time while it makes up for the first.
  for _ in range(2):
    with monkeypatch.context() as patch:
      interrupt_evaluation(patch, step)
      with pytest.raises(StoppedRun, match=f"step {step} is saved"):
        run_steps(config, data, run)
    assert [row["step"] for row in rows(run)] == list(range(1, step))
    assert saved_steps(run / "checkpoints")[-1] == step
  run_steps(config, data, run)
  assert rows(run) == rows(other)
  for folder in (run, other):
    kept = saved_steps(folder / "checkpoints")
    assert [read_manifest(folder / "checkpoints" / str(s)).metric for s in kept] == [1.0, 1.0]


def test_paying_goes_over_the_only_checkpoint_without_a_moment_without_one(tmp_path, monkeypatch):
  chosen = SMALL | dict(eval__every=3, checkpoint__every=3, checkpoint__keep=1)
  config, run = tiny.experiment(**chosen), tmp_path / "run"
  data = prepare(config.data)
  run.mkdir()
  with monkeypatch.context() as patch:
    interrupt_evaluation(patch, 3)
    with pytest.raises(StoppedRun):
      run_steps(config, data, run)
  seen, commit = [], Checkpoints._commit

  def looking(self, draft):
    seen.append(saved_steps(run / "checkpoints"))
    commit(self, draft)

  monkeypatch.setattr(Checkpoints, "_commit", looking)
  run_steps(config, data, run)
  assert seen == [[3], [3]] and saved_steps(run / "checkpoints") == [6]


def test_alarms_of_a_step_are_told_once_though_its_evaluation_is_interrupted(tmp_path, monkeypatch):
  chosen = dict(eval__every=1, checkpoint__every=100, model__segments=(("attention:moe", 1),))
  chosen |= dict(faults__collapse_violation=0.01, faults__collapse_rows=1, steps=2)
  config, run = tiny.experiment(**chosen), tmp_path / "run"
  data = prepare(config.data)
  run.mkdir()
  with monkeypatch.context() as patch:
    interrupt_evaluation(patch, 1)
    with pytest.raises(StoppedRun):
      run_steps(config, data, run)
  # A start that pays and is killed before it saves again, and one that goes on.
  with monkeypatch.context() as patch:
    patch.setattr(loop._Training, "_train", lambda self: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
      run_steps(config, data, run)
  run_steps(config, data, run)
  told = [event["step"] for event in read_events(run) if event["event"] == "expert_collapse"]
  assert told == [1]
  assert [row["step"] for row in rows(run)] == [1, 2]


def test_surgery_waits_for_a_row_that_is_owed(tmp_path, monkeypatch, capsys):
  words = tiny.command(tmp_path / "run", **SMALL | dict(eval__every=3))
  interrupt_evaluation(monkeypatch, 3)
  assert main(words) == EXIT_AGAIN
  words = ["convert", "upcycle", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
  assert main([*words, "--num_experts=4"]) == 2
  assert "while it evaluated step 3, and the checkpoint owes" in capsys.readouterr().err


def test_a_second_interrupt_ends_at_once():
  with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)


def test_off_the_main_thread_signals_are_left_alone():
  before = signal.getsignal(signal.SIGTERM)
  seen = []

  def open_one():
    with StopRequest() as stop:
      seen.append((bool(stop), signal.getsignal(signal.SIGTERM)))

  thread = threading.Thread(target=open_one)
  thread.start()
  thread.join()
  assert seen == [(False, before)]


def test_a_stopped_run_is_a_user_error_of_its_own_status():
  assert issubclass(StoppedRun, UserError) and UserError.status == 2 and StoppedRun.status == 75


def test_a_hung_process_says_where_it_hangs_and_ends(tmp_path):
  ended = subprocess.run(
    [sys.executable, "-c", HANG, str(tmp_path)],
    cwd=tiny.ROOT,
    env=os.environ | {"PYTHONPATH": str(tiny.ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert ended.returncode == EXIT_HUNG == 124
  text = (tmp_path / "hang-0.txt").read_text()
  for said in (text, ended.stderr):
    assert "no step has ended for 0.2 seconds" in said and "wait_for_ever" in said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path):
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  file = LineFile(tmp_path / "metrics.jsonl")
  with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(No space left"):
    file.append("{}\n")


def test_a_row_that_does_not_fit_leaves_the_rows_before_it(tmp_path):
  code = """
import resource, sys
from pathlib import Path
from moe_jax.errors import UserError
from moe_jax.training.writers import JsonLinesWriter
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = JsonLinesWriter(Path(sys.argv[1]), 0)
writer.write({"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
try:
  writer.write({"step": 2, "text": "a" * 50})
except UserError as error:
  print(error)
writer.close()
"""
  ended = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)],
    cwd=tiny.ROOT,
    env=os.environ | {"PYTHONPATH": str(tiny.ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert "cannot be written (File too large): make room" in ended.stdout, ended.stderr
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_metrics_of_a_full_disk_end_a_run_that_can_go_on(tmp_path, monkeypatch, capsys):
  words = tiny.command(tmp_path / "run", **SMALL | dict(checkpoint__every=2))
  write = JsonLinesWriter.write

  def full(self, row):
    if row["step"] == 4:
      raise UserError("metrics.jsonl cannot be written (No space left on device): make room")
    write(self, row)

  with monkeypatch.context() as patch:
    patch.setattr(JsonLinesWriter, "write", full)
    assert main(words) == 2
  assert capsys.readouterr().err.count("\n") == 1
  assert saved_steps(tmp_path / "run" / "checkpoints") == [2]
  config = tiny.experiment(**SMALL | dict(checkpoint__every=2))
  run_steps(config, prepare(config.data), tmp_path / "run")
  assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
  told = read_goodput(tmp_path / "run")
  assert [start["first_step"] for start in told["starts"]][-1] == 2
  assert 0 < told["goodput"] < 1


def start(begun, first, last, again=0, **seconds):
  every = {activity.value: float(seconds.get(activity.value, 0)) for activity in Activity}
  return {
    "begun": begun,
    "first_step": first,
    "last_step": last,
    "steps_again": again,
    "seconds": every,
  }


def test_goodput_leaves_out_steps_that_were_trained_again():
  first = start(0, 0, 30, init=2, compile=3, step=60)
  second = start(70, 20, 50, again=10, init=5, step=80, checkpoint=5)
  told = account([first, second])
  # A third of the first start's steps, and a quarter of the 40 that the second one trained.
  assert told["seconds"]["lost"] == pytest.approx(20 + 20)
  assert told["seconds"]["step"] == pytest.approx(40 + 60)
  assert told["seconds"]["down"] == pytest.approx(5)
  assert told["goodput"] == pytest.approx(100 / 160)
  assert account([])["goodput"] == 0


def test_events_beyond_the_restored_step_and_a_torn_line_are_cut(tmp_path):
  log = EventLog(tmp_path, 0)
  for step in (1, 2, 3):
    log.write({"event": "loss_spike", "step": step})
  log.close()
  with open(tmp_path / "events.jsonl", "a") as file:
    file.write('{"event": "lo')
  EventLog(tmp_path, 2).close()
  assert [event["step"] for event in read_events(tmp_path)] == [1, 2]
  (tmp_path / "events.jsonl").write_text("3\n")
  with pytest.raises(UserError, match="line 1 is no event"):
    read_events(tmp_path)


COUNTING = """
import pathlib, sys
path, *statuses = sys.argv[1:]
path = pathlib.Path(path)
count = len(path.read_text()) if path.exists() else 0
path.write_text("." * (count + 1))
sys.exit(int(statuses[min(count, len(statuses) - 1)]))
"""


@pytest.mark.parametrize(
  ("statuses", "restarts", "last", "starts"),
  [
    ([75, 1, 0], 9, 0, 3),
    ([1, 2], 9, 2, 2),
    ([124, 75], 2, 75, 3),
    ([1], 0, 1, 1),
  ],
)
def test_a_supervisor_starts_again_what_may_go_on(tmp_path, statuses, restarts, last, starts):
  words = [sys.executable, "-c", COUNTING, str(tmp_path / "count"), *map(str, statuses)]
  assert _Supervisor(words).run(restarts, 0.0) == last
  assert len((tmp_path / "count").read_text()) == starts


def test_a_supervisor_passes_the_end_on_and_does_not_start_again(tmp_path):
  code = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    "open(sys.argv[1], 'a').write('.')\n"
    "time.sleep(30)\n"
  )
  path = tmp_path / "started"

  def end_when_started():
    while not path.exists():
      time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=end_when_started)
  thread.start()
  assert _Supervisor([sys.executable, "-c", code, str(path)]).run(5, 0.0) == 75
  thread.join()
  assert path.read_text() == "."


@pytest.mark.parametrize(
  ("words", "fragment"),
  [
    (["supervise"], "takes a train command after --"),
    (["supervise", "--", "eval"], "not 'eval'"),
    (["supervise", "--restarts=-1", "--", "train"], "must be at least 0"),
    (["report", "--workdir=x", "--", "train"], "takes no command after --"),
  ],
)
def test_what_cannot_be_supervised_is_refused(words, fragment, capsys):
  assert main(words) == 2
  said = capsys.readouterr().err
  assert fragment in said and said.count("\n") == 1


FILLS_UP = """
import resource, sys
from training import tiny
from moe_jax.cli import main
from moe_jax.commands import summary
from moe_jax.training import loop
summary.xz_primed_bits_per_byte = lambda text, primer: 0.0
advance = loop._Training.advance
def filling_up(self):
  if self.step == 3 and sys.argv[2] == "full":
    # More than the metrics come to, less than the embedding: a write fails in the middle of a file.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
  advance(self)
loop._Training.advance = filling_up
sys.exit(main(tiny.command(sys.argv[1], "dense", checkpoint__every=2)))
"""


def test_a_checkpoint_that_a_full_disk_cuts_short_leaves_the_one_before(tmp_path):
  workdir = tmp_path / "run"

  # Compiled programs are kept on a disk too, and JAX warns of each that finds no room.
  alone = dict(JAX_DISABLE_MOST_OPTIMIZATIONS="1", JAX_ENABLE_COMPILATION_CACHE="0")

  def run(disk):
    return subprocess.run(
      [sys.executable, "-c", FILLS_UP, str(workdir), disk],
      env=tiny.environment(**alone),
      capture_output=True,
      text=True,
      timeout=240,
    )

  ended = run("full")
  assert ended.returncode == 2, ended.stderr
  (said,) = [line for line in ended.stderr.splitlines() if "error" in line.lower()]
  assert "the checkpoint of step 4 cannot be written" in said and "make room" in said
  assert "Traceback" not in ended.stderr
  assert saved_steps(workdir / "checkpoints") == [2]
  assert run("empty").returncode == 0
  assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6]


def test_a_thread_that_reads_and_dies_ends_the_run_which_then_goes_on(tmp_path, monkeypatch):
  """Batches are read ahead in threads: what kills one reaches the loop, and no batch is lost."""
  config = tiny.experiment(**SMALL | dict(checkpoint__every=2))
  data = prepare(config.data)
  gather, fifth = Records.gather, {"batch_size": config.batch_size, "seed": config.seed, "batch": 4}
  places_of_fifth = places_in_batch(data.train, **fifth)

  def dying(self, places):
    if list(places) == places_of_fifth:
      raise RuntimeError("this thread was killed")
    return gather(self, places)

  for name in ("broken", "whole"):
    (tmp_path / name).mkdir()
  with monkeypatch.context() as patch:
    patch.setattr(Records, "gather", dying)
    with pytest.raises(RuntimeError, match="this thread was killed"):
      run_steps(config, data, tmp_path / "broken")
  assert saved_steps(tmp_path / "broken" / "checkpoints") in ([2], [2, 4])
  for name in ("broken", "whole"):
    run_steps(config, data, tmp_path / name)
  losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("broken", "whole")]
  assert len(losses[0]) == 6 and losses[0] == losses[1]
