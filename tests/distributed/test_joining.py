"""Processes that cannot join, or disagree, say so in one sentence and end."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from distributed.tiny_processes import (
  as_in_readme,
  finish,
  free_port,
  several_processes,
  slurm,
  start,
)
from sharding.meshes import mesh_layout
from training import tiny

from moe_jax.cli import main
from moe_jax.errors import UserError
from moe_jax.sharding import processes
from moe_jax.training.placed import RowBlock, own_rows
from moe_jax.training.run_folder import check_joined_run, claim_run

WAIT = """
import sys
from moe_jax.sharding.processes import joined_processes
with joined_processes("localhost:{port}", 2, {process}, join_seconds=1):
  pass
"""


@pytest.mark.parametrize(
  ("given", "fragment"),
  [
    (["--process-id=1"], "--process_id=1 needs --coordinator and --num_processes too"),
    (["--coordinator=a:1", "--num_processes=2"], "needs --process_id too: give all three"),
    (["--coordinator=here", "--num-processes=2", "--process-id=0"], "expected HOST:PORT"),
    (["--coordinator=a:99999", "--num-processes=2", "--process-id=0"], "a port from 1 to 65535"),
    (["--coordinator=a:1", "--num-processes=2", "--process-id=2"], "must be from 0 to 1"),
    (["--coordinator=a:1", "--num-processes=0", "--process-id=0"], "there is at least 1"),
  ],
)
def test_flags_that_make_no_place_among_processes_are_refused(given, fragment, tmp_path, capsys):
  assert main(tiny.command(tmp_path / "run") + given) == 2
  message = capsys.readouterr().err
  assert fragment in message and message.count("\n") == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_waiting_for_processes_that_do_not_come_ends(process):
  code = WAIT.format(port=free_port(), process=process)
  ended = subprocess.run(
    [sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, timeout=60
  )
  assert ended.returncode == 2
  whom = "process 0" if process else "the others"
  assert f"process {process} of 2 has waited 1 seconds for {whom} at localhost:" in ended.stderr


def test_processes_with_unequal_numbers_of_devices_are_refused(monkeypatch):
  owners = [SimpleNamespace(process_index=process) for process in (1, 0, 1, 1)]
  monkeypatch.setattr(processes, "_join", lambda *_: None)
  monkeypatch.setattr(processes.jax, "devices", lambda: owners)
  with pytest.raises(UserError, match=r"\(1 of process 0, 3 of process 1\): give every process"):
    with processes.joined_processes("localhost:1", 2, 0):
      pytest.fail("they went on")


def test_without_a_cluster_a_process_is_alone():
  with processes.joined_processes():
    assert not jax.distributed.is_initialized()


def test_slurm_tells_of_the_processes(monkeypatch):
  for name, value in slurm(1, 8476).items():
    monkeypatch.setenv(name, value)
  place = processes._found(1)
  assert place["coordinator_address"] == "localhost:8476"
  assert (place["num_processes"], place["process_id"]) == (2, 1)


def test_a_cluster_that_is_told_of_wrongly_is_refused(monkeypatch):
  for name, value in slurm(1, 8476).items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("SLURM_NTASKS", "two")
  with pytest.raises(UserError, match="tells of several processes, but not which .*'two'"):
    processes._found(1)


def test_what_one_process_refuses_ends_both_and_leaves_nothing(tmp_path):
  port, (*by_hand, _) = free_port(), several_processes()
  by_hand[1] += " --config.sharding.expert=3"
  commands = [as_in_readme(line, tmp_path / "run", port) for line in by_hand]
  (first, *said), (second, *named) = finish([start(*command) for command in commands])
  assert (first, second) == (2, 2)
  assert "a mesh of fsdp = 2, expert = 3 has 6 devices, and there are 4" in named[1]
  assert "process 1 of 2 refuses: a mesh of fsdp = 2, expert = 3" in said[1]
  assert not (tmp_path / "run").exists()


def test_several_processes_on_one_device_are_refused(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "_share", lambda text: [text, text])
  assert main(tiny.command(tmp_path / "run")) == 2
  assert "config.sharding asks for one device, and 2 processes" in capsys.readouterr().err


def test_a_process_that_joins_another_run_is_refused(tmp_path):
  mapping = tiny.mapping()
  with pytest.raises(UserError, match="not the folder that process 0 writes"):
    check_joined_run(tmp_path / "elsewhere", mapping)
  with claim_run(tmp_path / "run", mapping):
    check_joined_run(tmp_path / "run", json.loads(json.dumps(mapping)))
    with pytest.raises(UserError, match="config.sharding.data is 1 there and 2 here"):
      check_joined_run(tmp_path / "run", tiny.mapping(sharding__data=2))


@pytest.mark.parametrize(
  ("mesh", "devices", "block"),
  [
    # Consecutive rows: each of two processes reads its half.
    ("dp", range(4), (0, 2)),
    ("dp", range(4, 8), (1, 2)),
    # One tensor over two processes, which read the same rows.
    ("tp", (0, 2), (0, 2)),
    ("tp", (1, 3), (0, 2)),
    ("tp", (4,), (2, 4)),
    # Scattered rows: all that lies between.
    ("dp", (0, 7), (0, 1)),
    ("dp", (3, 4), (0, 1)),
    ("dp", (2, 3), (1, 4)),
  ],
)
def test_a_process_reads_the_smallest_block_that_holds_its_rows(mesh, devices, block):
  own = [jax.devices()[i] for i in devices]
  assert own_rows(mesh_layout(mesh), 8, own) == RowBlock(*block)
