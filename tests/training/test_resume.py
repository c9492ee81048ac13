"""A run that was killed and started again equals one that was not, bit for bit."""

import fcntl
import json
import random
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from moe_jax.cli import main
from moe_jax.errors import UserError
from moe_jax.provenance import source_commit
from moe_jax.training.run_folder import check_run, claim_run, is_claimed
from moe_jax.training.run_outputs import RunOutputs
from moe_jax.training.saved_run import load_run
from moe_jax.training.writers import check_rows, cut_after

WALL_CLOCK = {"tokens_per_second"}
# Random numbers in every place that draws them, two microbatches, and checkpoints that fall between
# logged steps.
RUN = dict(
  steps=40,
  accumulation_steps=2,
  eval__every=20,
  checkpoint__every=15,
  log__every=4,
  model__dropout=0.1,
  moe__expert_dropout=0.1,
  moe__router_jitter=0.01,
)


def rows(workdir) -> list[dict]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in lines]


def assert_same_run(a, b):
  assert rows(a) == rows(b)
  assert [row["step"] for row in rows(a)] == sorted({row["step"] for row in rows(a)})
  (_, step_a, params_a), (_, step_b, params_b) = load_run(a), load_run(b)
  assert step_a == step_b
  for x, y in zip(jax.tree.leaves(params_a), jax.tree.leaves(params_b), strict=True):
    np.testing.assert_array_equal(x, y)
  summaries = [json.loads((d / "summary.json").read_text()) for d in (a, b)]
  for summary in summaries:
    del summary["wall_seconds"], summary["tokens_per_second"]
  assert summaries[0] == summaries[1]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  assert main(tiny.command(workdir, **RUN)) == 0
  return workdir


def start(workdir) -> subprocess.Popen:
  command = tiny.command(workdir, **RUN)
  # As many devices as the tests have, as the summary names them, and compiled as they are.
  environment = tiny.environment(
    JAX_NUM_CPU_DEVICES=str(jax.device_count()), JAX_DISABLE_MOST_OPTIMIZATIONS="1"
  )
  return subprocess.Popen(
    [sys.executable, "-m", "moe_jax.cli", *command],
    cwd=tiny.ROOT,
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )


def wait_for_rows(process, workdir, count: int) -> None:
  """Returns once metrics.jsonl has `count` rows, or the run is over."""
  path = workdir / "metrics.jsonl"
  while process.poll() is None:
    if path.exists() and path.read_text().count("\n") >= count:
      return
    time.sleep(0.01)


def test_killed_at_several_moments_and_resumed_equals_an_uninterrupted_run(whole_run, tmp_path):
  workdir = tmp_path / "killed"
  # Before the first checkpoint, just after one (its save may be under way), between two, and after
  # the last step, when the summary is made.
  for count in (2, 4, 8, 11):
    process = start(workdir)
    wait_for_rows(process, workdir, count)
    time.sleep(random.Random(count).uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.wait()
  process = start(workdir)
  assert process.wait() == 0
  assert_same_run(workdir, whole_run)


def test_a_finished_run_started_again_changes_nothing(whole_run, capsys):
  before = (whole_run / "metrics.jsonl").read_bytes()
  assert main(tiny.command(whole_run, **RUN)) == 0
  assert (whole_run / "metrics.jsonl").read_bytes() == before
  assert "held-out bits per byte" in capsys.readouterr().out


def test_a_complete_run_keeps_its_summary(whole_run):
  before = (whole_run / "summary.json").read_bytes()
  assert json.loads(before)["wall_seconds"] > 1
  assert main(tiny.command(whole_run, **RUN)) == 0
  assert (whole_run / "summary.json").read_bytes() == before


def test_how_a_run_is_reported_is_no_part_of_its_identity(whole_run):
  assert main(tiny.command(whole_run, **RUN, report__baseline="other.json")) == 0
  assert json.loads((whole_run / "config.json").read_text())["report"]["baseline"] == "other.json"


def test_a_second_process_in_the_same_folder_is_refused(whole_run, capsys):
  with claim_run(whole_run, json.loads((whole_run / "config.json").read_text())):
    assert main(tiny.command(whole_run, **RUN)) == 2
  assert "another process is training there" in capsys.readouterr().err


def test_one_who_only_looks_whether_a_run_is_trained_keeps_no_training_out(tmp_path):
  with claim_run(tmp_path / "run", {}):
    pass
  with (tmp_path / "run/.lock").open() as looked:
    fcntl.flock(looked, fcntl.LOCK_SH)
    threading.Timer(0.15, fcntl.flock, (looked, fcntl.LOCK_UN)).start()
    with claim_run(tmp_path / "run", {}):
      assert is_claimed(tmp_path / "run")
  assert not is_claimed(tmp_path / "run")


@pytest.mark.parametrize("name", ["link", "link/run"])
def test_a_link_to_nowhere_is_named(name, tmp_path):
  (tmp_path / "link").symlink_to("away")
  with pytest.raises(UserError, match="link is a link to away, which is not there"):
    check_run(tmp_path / name, {})


def test_a_run_of_another_config_is_refused_and_left_alone(whole_run, capsys):
  before = {p: p.read_bytes() for p in whole_run.iterdir() if p.is_file()}
  assert main(tiny.command(whole_run, **{**RUN, "steps": 41})) == 2
  message = capsys.readouterr().err
  assert "config.steps is 40 there and 41 here" in message
  assert message.count("\n") == 1
  assert before == {p: p.read_bytes() for p in whole_run.iterdir() if p.is_file()}


def test_rows_beyond_the_checkpoint_and_a_torn_line_are_cut(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
  cut_after(path, 2)
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
  cut_after(tmp_path / "absent.jsonl", 2)


@pytest.mark.parametrize(
  "content, fragment",
  [
    (None, "lacks the row of step 1"),
    ("", "lacks the row of step 1"),
    ('{"step": 1}\n{"step": 2}', "lacks the row of step 2"),
    ('{"step": 1}\n{"step": 3}\n', "lacks the row of step 2"),
    ('{"step": 1}\ngarbage\n{"step": 3}\n', "line 2 is no row"),
    ('{"step": 1}\n3\n{"step": 3}\n', "line 2 is no row"),
  ],
)
def test_rows_that_a_checkpoint_comes_after_must_be_there(tmp_path, content, fragment):
  path = tmp_path / "metrics.jsonl"
  if content is not None:
    path.write_text(content)
  with pytest.raises(UserError, match=fragment):
    check_rows(tmp_path, 3, [1, 2, 3])
  assert content is None or path.read_text() == content


def test_damaged_events_are_refused_before_rows_are_cut(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
  (tmp_path / "events.jsonl").write_text('{"event": "started"}\n')
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  with pytest.raises(UserError, match="line 1 is no event"):
    RunOutputs(tiny.experiment(log__every=1), tmp_path, restored_step=2)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rows_beyond_the_checkpoint_may_be_damaged(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\ngarbage\n{"s')
  check_rows(tmp_path, 2, [1, 2])
  check_rows(tmp_path, 0, [])


def test_eval_and_generate_and_report_read_a_run(whole_run, capsys):
  assert main(["eval", f"--workdir={whole_run}"]) == 0
  shown = capsys.readouterr().out
  final = rows(whole_run)[-1]
  assert f"{final['eval_loss']:.4f} nats per token" in shown
  assert f"{final['eval_loss_at_capacity']:.4f} nats per token" in shown
  assert main(["eval", f"--workdir={whole_run}", "--step=30"]) == 0
  assert "at step 30" in capsys.readouterr().out
  generate = ["generate", f"--workdir={whole_run}", "--prompt=Fellow", "--max_new_tokens=5"]
  assert main(generate) == 0
  first = capsys.readouterr().out
  assert first.startswith("Fellow")
  assert main(generate) == 0
  assert capsys.readouterr().out == first
  assert main(["report", f"--workdir={whole_run}"]) == 0
  assert (whole_run / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
  "argv, fragments",
  [
    (["eval", "--workdir={run}", "--step=7"], ["no step 7", "nearest is"]),
    (["eval", "--workdir={empty}"], ["holds no config.json"]),
    (["generate", "--workdir={run}", "--prompt=a", "--temperature=-1"], ["temperature"]),
  ],
)
def test_commands_on_a_wrong_run_are_one_line(whole_run, tmp_path, capsys, argv, fragments):
  words = [word.format(run=whole_run, empty=tmp_path) for word in argv]
  assert main(words) == 2
  message = capsys.readouterr().err
  assert message.count("\n") == 1
  for fragment in fragments:
    assert fragment in message


def test_groups_that_do_not_divide_the_batch_train_to_the_report(tmp_path):
  words = tiny.command(tmp_path / "run", steps=2, moe__grouping="fixed", moe__group_size=30)
  assert main(words) == 0
  shares = json.loads((tmp_path / "run" / "summary.json").read_text())["routing"]
  assert sum(expert["share"] for expert in shares[0]["experts"]) == pytest.approx(1.0)


def test_no_git_is_no_fault(monkeypatch):
  monkeypatch.setenv("PATH", "")
  assert source_commit() is None


def test_tensorboard_events_are_written_on_request(tmp_path):
  assert main(tiny.command(tmp_path / "run", steps=2, log__tensorboard="true")) == 0
  events = list((tmp_path / "run" / "tensorboard").iterdir())
  assert events and events[0].stat().st_size > 100
