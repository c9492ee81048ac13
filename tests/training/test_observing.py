"""Trackers, traces, and the picture of a run as it stands."""

import json
import os
import signal
import sys
import types

import jax
import pytest

from moe_jax.analysis import time_spent
from moe_jax.cli import main
from moe_jax.commands.watch_picture import heat_strip, sparkline
from moe_jax.errors import UserError
from moe_jax.training.config import LogConfig
from moe_jax.training.goodput import Activity, Goodput
from moe_jax.training.profiling import Profiler, nothing_to_trace
from moe_jax.training.run_folder import claim_run
from moe_jax.training.writers import check_writers, open_writers


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_rows_go_to_a_tracker_that_the_config_names(package, tmp_path, monkeypatch):
  calls = []
  stand_in = types.ModuleType(package)
  stand_in.init = lambda **given: calls.append(("init", given))
  stand_in.log = lambda scalars, step: calls.append(("log", step, scalars))
  stand_in.finish = lambda: calls.append(("finish",))
  monkeypatch.setitem(sys.modules, package, stand_in)
  for _ in range(2):
    _, writer = open_writers(LogConfig(**{package: "moe"}), tmp_path, 0)
    writer.write({"step": 3, "loss": 1.5, "moe/layer_0/load": [0.5, 0.5], "mtp_loss": None})
    writer.close()
  (_, first), row, end, (_, again), *_ = calls
  assert first["project"] == "moe" and first["resume"] == "allow" and first == again
  assert row == ("log", 3, {"loss": 1.5}) and end == ("finish",)


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(package, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match=f"pip install {package}"):
    check_writers(LogConfig(**{package: "moe"}))


@pytest.fixture
def traces(monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(path))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("end"))
  return calls


def test_sigusr1_before_and_after_the_steps_ends_nothing(tmp_path, traces):
  before = signal.getsignal(signal.SIGUSR1)
  with nothing_to_trace():
    os.kill(os.getpid(), signal.SIGUSR1)
    with Profiler((0, 0), tmp_path) as profiler:
      profiler.before(1)
    os.kill(os.getpid(), signal.SIGUSR1)
  assert signal.getsignal(signal.SIGUSR1) == before and not traces


def test_planned_steps_and_those_after_sigusr1_are_traced(tmp_path, traces):
  with Profiler((2, 2), tmp_path) as profiler:
    for step in range(1, 14):
      profiler.before(step)
      profiler.after(step, None)
      if step in (3, 5):
        traces.append(step)
      if step == 5:
        os.kill(os.getpid(), signal.SIGUSR1)
  folder = tmp_path / "profile"
  assert traces == [str(folder / "step_2"), "end", 3, 5, str(folder / "step_6"), "end"]
  assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_trace_that_the_run_ends_in_is_ended(tmp_path, traces):
  with Profiler((1, 9), tmp_path) as profiler:
    profiler.before(1)
  assert traces[-1] == "end"


def test_a_profile_that_begins_before_the_run_is_refused():
  with pytest.raises(UserError, match="profile = "):
    LogConfig(profile=(0, 3))


def test_sparklines_span_lowest_to_highest_and_leave_gaps():
  assert sparkline([1.0, 2.0, None, 8.0]) == "▁▂ █"
  assert sparkline([1.0] * 3) == "▁▁▁" and sparkline([None]) == ""
  assert sparkline([float(i) for i in range(100)], width=4) == "▁▃▆█"
  # One value far above the others leaves their shape.
  assert len(set(sparkline([1000.0, *(float(i) for i in range(29))]))) == 8


def test_a_dead_expert_stands_out():
  strip = heat_strip([0.0, 0.5, 0.25, 0.25])
  assert strip.plain == "x█▅▅  the fullest 2.00 times the even share"
  assert [span.style for span in strip.spans] == ["red", "yellow"]


@pytest.fixture
def run(tmp_path):
  with claim_run(tmp_path / "run", {"steps": 40}):
    pass
  row = {"loss": 2.0, "tokens_per_second": 100.0, "moe/layer_1/load": [0.5, 0.5]}
  rows = [row | {"step": step, "tokens": 10 * step} for step in (10, 20)]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "run" / "metrics.jsonl").write_text(text + '{"step": 3')
  goodput = Goodput(tmp_path / "run")
  goodput.begin(0)
  goodput.end_step(20, write=True)
  return tmp_path / "run"


def shown(run, capsys) -> str:
  assert main(["watch", f"--workdir={run}", "--once"]) == 0
  return capsys.readouterr().out


def test_a_dead_a_running_and_a_finished_run_are_shown(run, capsys):
  picture = shown(run, capsys)
  assert "run: not running" in picture and "20 of 40 (50.0%)" in picture
  assert "layer 1" in picture and "▅▅" in picture and "left" not in picture
  with claim_run(run, {"steps": 40}):
    picture = shown(run, capsys)
    assert "run: running" in picture and "2.0 s left" in picture
  (run / "summary.json").write_text("{}")
  assert "run: finished" in shown(run, capsys)


def test_a_run_without_rows_is_shown_and_no_run_is_refused(run, tmp_path, capsys):
  (run / "metrics.jsonl").unlink()
  assert "none of 40 logged yet" in shown(run, capsys)
  assert main(["watch", f"--workdir={tmp_path}"]) == 2
  assert "holds no config.json" in capsys.readouterr().err


def test_the_report_tells_where_time_went_and_what_happened(run):
  event = {"event": "loss_spike", "step": 3, "text": "loss <spike>"}
  (run / "events.jsonl").write_text(json.dumps(event) + "\n{")
  text = time_spent.section(run)
  assert all(name in text for name in Activity)
  assert "loss &lt;spike&gt;" in text
  (run / "goodput.json").write_text("{}")
  with pytest.raises(UserError, match="delete it"):
    time_spent.section(run)
  (run / "goodput.json").unlink()
  assert "kept no goodput.json" in time_spent.section(run)
