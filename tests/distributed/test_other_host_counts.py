"""A run of eight devices on four hosts goes on with two hosts of one device, and with one alone."""

import shutil

import pytest
from distributed.test_two_processes import assert_same_run, rows
from distributed.tiny_processes import DIES_AT, RUN, cache, finish, free_port, start
from training import tiny

HOSTS, DEVICES_A_HOST = 4, 2
# Eight sequences: each device has one. Three axes, so that an array is split and held twice.
# Long enough for all to agree on a step before the last.
RUN_OF_EIGHT = RUN | {"steps": 24, "batch_size": 8}
MESH_OF_EIGHT = {"layout": "ep_fsdp", "data": 2, "fsdp": 2, "expert": 2}


def _start(folder, workdir, count, devices, mesh, fates=()):
  """Starts a run's processes; they find programs that others have compiled."""
  words = tiny.command(workdir, **RUN_OF_EIGHT)
  words += [f"--config.sharding.{name}={value}" for name, value in mesh.items()]
  port, processes = free_port(), []
  for index in range(count):
    own = list(words)
    if count > 1:
      own += [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
      own.append(f"--process_id={index}")
    variables = cache(folder / "compiled") | {"JAX_NUM_CPU_DEVICES": str(devices)}
    fate = fates[index] if index < len(fates) else "lives"
    processes.append(start(own, variables, fate))
  return processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def told_to_end(folder):
  """A run of four hosts of which the last is sent SIGTERM; all save the same step."""
  workdir = folder / "four"
  fates = ("lives", "lives", "lives", "ends")
  results = finish(_start(folder, workdir, HOSTS, DEVICES_A_HOST, MESH_OF_EIGHT, fates))
  assert [status for status, *_ in results] == [75] * HOSTS, results
  return workdir


@pytest.fixture(scope="module")
def undisturbed(folder):
  """The same run by one process of one device."""
  workdir = folder / "undisturbed"
  ((status, *said),) = finish(_start(folder, workdir, 1, 1, {}))
  assert status == 0, said
  return workdir


@pytest.mark.full
@pytest.mark.parametrize(
  ("hosts", "mesh"), [(2, {"layout": "ep", "expert": 2}), (1, {})], ids=["two_hosts", "alone"]
)
def test_fewer_hosts_go_on_with_the_same_data_and_losses(
  folder, told_to_end, undisturbed, hosts, mesh, record_property
):
  record_property("configs", 1)
  record_property("inputs", 1)
  workdir = folder / f"on_{hosts}"
  shutil.copytree(told_to_end, workdir)
  saved = rows(workdir)[-1]["step"]
  assert DIES_AT <= saved < RUN_OF_EIGHT["steps"]
  results = finish(_start(folder, workdir, hosts, 1, mesh))
  assert [status for status, *_ in results] == [0] * hosts, results
  assert f"resuming {workdir} at step {saved}" in results[0][1]
  # Other data would differ in the first digit of the loss.
  assert_same_run(workdir, undisturbed)
