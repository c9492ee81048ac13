"""The script on the hosts: what it does twice it does once, and it keeps statuses."""

import os
import shutil
import subprocess
import time

import pytest
from cloud.stand_in import HERE, ROOT

SCRIPT = ROOT / "experiments/cloud/worker.sh"


@pytest.fixture
def host(tmp_path):
  """A home folder with a `bin` that comes first; returns what runs the script there."""
  programs = tmp_path / "bin"
  programs.mkdir()

  def call(*words, wait=True):
    environment = os.environ | {"HOME": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}"}
    process = subprocess.Popen(
      ["bash", str(SCRIPT), *words], env=environment, stdout=subprocess.PIPE, text=True
    )
    return (process.communicate(timeout=60)[0], process.returncode) if wait else process

  def program(name, lines):
    (programs / name).write_text(f"#!/bin/sh\n{lines}\n")
    (programs / name).chmod(0o755)

  call.home, call.program = tmp_path, program
  return call


def test_the_status_and_the_words_of_a_training_come_back(host):
  said, status = host("train", "run", "/w", "none", "sh", "-c", "echo step 1; exit 75")
  assert status == 75 and "step 1" in said


def test_a_training_that_runs_is_joined_not_started_again(host):
  code = "echo started >>$HOME/starts; until [ -e $HOME/go ]; do echo tick; sleep 0.05; done"
  both = [host("train", "run", "/w", "none", "sh", "-c", code, wait=False)]
  assert both[0].stdout.readline() == "tick\n"
  both.append(host("train", "run", "/w", "none", "sh", "-c", code, wait=False))
  assert both[1].stdout.readline() == "tick\n"
  (host.home / "go").touch()
  for process in both:
    process.communicate(timeout=60)
    assert process.returncode == 0
  assert (host.home / "starts").read_text().count("started") == 1


def test_a_lost_connection_leaves_the_training_alone(host):
  code = "until [ -e $HOME/go ]; do echo tick; sleep 0.05; done; echo done >$HOME/end"
  first = host("train", "run", "/w", "none", "sh", "-c", code, wait=False)
  assert first.stdout.readline() == "tick\n"
  first.kill()
  first.wait()
  second = host("train", "run", "/w", "none", "false", wait=False)
  assert second.stdout.readline() == "tick\n"
  (host.home / "go").touch()
  second.communicate(timeout=60)
  assert second.returncode == 0 and (host.home / "end").exists()


def test_stop_lets_the_training_save(host):
  code = "trap 'echo saved; exit 75' TERM; echo up; while :; do sleep 0.05; done"
  first = host("train", "run", "/w", "none", "bash", "-c", code, wait=False)
  log = host.home / "moe_jax_runs/run/log"
  while not (log.exists() and "up" in log.read_text()):
    time.sleep(0.02)
  assert host("stop", "run")[1] == 0
  said, _ = first.communicate(timeout=60)
  assert first.returncode == 75 and "saved" in said
  assert host("stop", "run")[1] == 0


def test_loop_starts_again_while_the_training_asks_for_it(host):
  code = 'echo x >>$HOME/n; test "$(wc -l <$HOME/n)" -ge 3 || exit 75'
  assert host("loop", "run", "/w", "none", "sh", "-c", code)[1] == 0
  assert (host.home / "n").read_text().count("x") == 3
  assert host("loop", "other", "/w", "none", "sh", "-c", "exit 2")[1] == 2


def test_a_host_alone_goes_on_from_the_bucket_and_copies_to_it(host):
  host.program("gcloud", f'FAKE_GCLOUD={host.home} exec python3 {HERE / "fake_gcloud.py"} "$@"')
  run = host.home / "buckets/b/run"
  run.mkdir(parents=True)
  (run / "config.json").write_text("{}")
  workdir = host.home / "run"
  code = f"cp {workdir}/config.json {workdir}/summary.json"
  assert host("train", "run", str(workdir), "gs://b", "sh", "-c", code)[1] == 0
  assert (run / "summary.json").exists() and list(host.home.glob("buckets/b/logs/*/run/log"))


def with_bucket(host, lines=""):
  """Gives the host a gcloud of folders, after some lines of its own; returns its run's bucket."""
  fake = f'FAKE_GCLOUD={host.home} exec python3 {HERE / "fake_gcloud.py"} "$@"'
  host.program("gcloud", f"{lines}\n{fake}")
  return host.home / "buckets/b/run"


def test_stop_copies_what_was_saved_to_the_bucket_and_keeps_the_status(host):
  run, workdir = with_bucket(host), host.home / "run"
  code = f"mkdir {workdir}; trap 'echo saved >{workdir}/step; exit 75' TERM; echo up;"
  code += " while :; do sleep 0.05; done"
  first = host("train", "run", str(workdir), "gs://b", "bash", "-c", code, wait=False)
  while first.stdout.readline() != "up\n":
    pass
  assert host("stop", "run")[1] == 0
  first.communicate(timeout=60)
  assert first.returncode == 75
  assert (run / "step").read_text() == "saved\n"


@pytest.mark.parametrize("fault", ["ls", "rsync"])
def test_a_bucket_that_does_not_answer_begins_no_run_that_would_replace_its_copy(host, fault):
  lines = f'[ "$2" != {fault} ] || {{ echo "ERROR: 503: Backend Error" >&2; exit 1; }}'
  run, workdir = with_bucket(host, lines), host.home / "run"
  run.mkdir(parents=True)
  (run / "config.json").write_text("{}")
  said, status = host("train", "run", str(workdir), "gs://b", "echo", "begun")
  assert status == 1 and "begun" not in said and "503" in said
  assert not (workdir / "config.json").exists()
  # Once it answers, the run goes on from there.
  with_bucket(host)
  assert host("train", "run", str(workdir), "gs://b", "cat", f"{workdir}/config.json")[1] == 0


def test_a_copy_from_the_bucket_that_was_cut_short_is_made_again(host):
  run, workdir = with_bucket(host), host.home / "run"
  run.mkdir(parents=True)
  for name in ("config.json", "step"):
    (run / name).write_text("{}")
  draft = host.home / "run.copying"
  draft.mkdir()
  (draft / "config.json").write_text("{}")
  assert host("train", "run", str(workdir), "gs://b", "cat", f"{workdir}/step")[1] == 0
  assert not draft.exists()


def test_a_commit_is_installed_once(host):
  host.program("uv", 'echo "$@" >>$HOME/uv; [ "$1" != venv ] || mkdir -p $HOME/moe_jax_environment')
  for name in ("requirements.lock", "setup.py"):
    shutil.copy(ROOT / name, host.home)
  subprocess.run(
    ["tar", "-czf", "moe_jax_source.tar.gz", "requirements.lock", "setup.py"],
    cwd=host.home,
    check=True,
  )
  for _ in range(2):
    assert host("setup", "abc", "ready", "/w/run")[1] == 0
  lines = (host.home / "uv").read_text().splitlines()
  assert [line.split()[0] for line in lines] == ["venv", "pip"]
  assert lines[1].endswith(f"-e {host.home}/moe_jax_source[tpu]")


def test_an_unknown_verb_is_refused(host):
  assert host("start")[1] == 2


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_clean():
  scripts = [SCRIPT, *(HERE / "golden").glob("*.sbatch")]
  assert len(scripts) > 2
  subprocess.run(["shellcheck", *map(str, scripts)], check=True)
