"""One program in many processes: how they find each other, agree, and end together.

Each process runs the same commands on the devices of its own host; JAX makes one set of devices of
them all. Nothing here may be called under `jax.jit`.
"""

import atexit
import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from moe_jax.errors import UserError

# Hosts of a pod may start minutes apart.
_JOIN_SECONDS = 300
# How long a process that ends waits for the others to end. They meet before a good end, so that
# only one that fails alone waits so long.
_LEAVE_SECONDS = 10
# Bytes of a fault that are shown to the other processes.
_FAULT_LENGTH = 1024


@contextlib.contextmanager
def joined_processes(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  join_seconds: float = _JOIN_SECONDS,
) -> Iterator[None]:
  """Joins the processes of a run, before anything else is computed, and leaves them at the end.

  Without arguments they are those that the environment tells of: a TPU pod, also on GKE, a
  Kubernetes Job or JobSet (with the package kubernetes), Slurm, Open MPI 4; else this process is
  alone.

  A process that fails ends all, within the time that JAX takes to notice: at once where they are
  computing together, 100 seconds otherwise.

  Args:
    coordinator: HOST:PORT, where process 0 listens.
    num_processes: how many there are.
    process_id: which one this is, from 0.
    join_seconds: how long to wait for the others.

  Raises:
    UserError: some of the three are missing or out of range, the others do not come, or have
      other numbers of devices.
  """
  place = _given(coordinator, num_processes, process_id) or _found(join_seconds)
  if place is None or jax.distributed.is_initialized():
    yield
    return
  _join(place, join_seconds)
  try:
    _check_equal_hosts()
    yield
  except UserError:
    raise  # All processes refuse alike, and part as after a good end.
  except BaseException as error:
    atexit.register(_end_at_once, 130 if isinstance(error, KeyboardInterrupt) else 1)
    raise
  multihost_utils.sync_global_devices("end")


def is_first_process() -> bool:
  """Tells whether this is the process that writes what a run says about itself."""
  return jax.process_index() == 0


def first_process_says(value: int) -> int:
  """Returns the first process's value on all of them; every process must call it."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Raises on every process what one of them refuses within; nothing within may communicate.

  Raises:
    UserError: a process refuses; the others name it.
  """
  fault = None
  try:
    yield
  except UserError as error:
    fault = error
  faults = [] if jax.process_count() == 1 else _share(str(fault or ""))
  if fault is not None:
    raise fault
  for process, text in enumerate(faults):
    if text:
      raise UserError(f"process {process} of {len(faults)} refuses: {text}")


def _share(text: str) -> list[str]:
  """Returns the texts of all processes."""
  raw = np.frombuffer(text.encode()[:_FAULT_LENGTH].ljust(_FAULT_LENGTH, b"\0"), np.uint8)
  rows = multihost_utils.process_allgather(raw)
  return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in np.asarray(rows)]


def _given(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any] | None:
  """Checks what the command line tells of the processes; None if it tells nothing."""
  flags = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  missing = [f"--{name}" for name, value in flags.items() if value is None]
  if len(missing) == len(flags):
    return None
  if missing:
    given = " and ".join(f"--{name}={v}" for name, v in flags.items() if v is not None)
    raise UserError(
      f"{given} needs {' and '.join(missing)} too: give all three, or none where the environment"
      " tells of the processes (TPU pod, GKE, Slurm, Open MPI)"
    )
  host, colon, port = coordinator.rpartition(":")
  if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
    raise UserError(
      f"--coordinator={coordinator} is no address; expected HOST:PORT with a port from 1 to 65535,"
      " for example localhost:8476"
    )
  if num_processes < 1:
    raise UserError(f"--num_processes={num_processes} is refused: there is at least 1")
  if not 0 <= process_id < num_processes:
    raise UserError(
      f"--process_id={process_id} is refused: with --num_processes={num_processes} it must be from"
      f" 0 to {num_processes - 1}"
    )
  return {"coordinator_address": coordinator} | {k: flags[k] for k in list(flags)[1:]}


def _found(join_seconds: float) -> dict[str, Any] | None:
  """Returns what the environment tells of the processes; None if it tells nothing.

  `jax.distributed.initialize` looks there itself, but takes a program for a faulty one that is
  alone, or has computed before. So the same detection is asked first.
  """
  names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
  nothing = dict.fromkeys(names)
  try:
    found = ClusterEnv.auto_detect_unset_distributed_params(
      **nothing, cluster_detection_method=None, initialization_timeout=int(join_seconds)
    )
  # The detections parse variables and ask servers, and raise whatever that does.
  except Exception as error:
    raise UserError(
      f"the environment tells of several processes, but not which ({type(error).__name__}:"
      f" {error}); mend it, or give --coordinator, --num_processes and --process_id"
    ) from error
  place = dict(zip(names, found, strict=True))
  return None if place == nothing else place


def _join(place: dict[str, Any], join_seconds: float) -> None:
  """Joins the others, or gives up in time: the runtime itself would abort without a word.

  Raises:
    UserError: the others do not come.
  """
  failures = []

  def initialize():
    try:
      jax.distributed.initialize(
        **place,
        cluster_detection_method="deactivate",
        # Never the first to give up.
        initialization_timeout=int(join_seconds) + 60,
        shutdown_timeout_seconds=_LEAVE_SECONDS,
      )
    except Exception as error:
      failures.append(error)

  # A CPU device reaches another process's by gloo, which comes with JAX.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  thread = threading.Thread(target=initialize, daemon=True)
  thread.start()
  thread.join(join_seconds)
  where, who = place["coordinator_address"], place["process_id"]
  if thread.is_alive():
    atexit.register(_end_at_once, 2)
    whom = "process 0" if who else "the others"
    raise UserError(
      f"process {who} of {place['num_processes']} has waited {join_seconds:.0f} seconds for {whom}"
      f" at {where}: start them all, with an address of process 0 that every host reaches"
    )
  if failures:
    raise UserError(
      f"process {who} cannot join the others at {where} ({failures[0]}): give an address of process"
      " 0 with a free port, and start this program anew"
    ) from failures[0]


def _check_equal_hosts() -> None:
  """Refuses processes with unequal numbers of devices, which cannot exchange what they must.

  Raises:
    UserError: names the numbers.
  """
  counts = Counter(device.process_index for device in jax.devices())
  if len(set(counts.values())) > 1:
    given = ", ".join(f"{counts[process]} of process {process}" for process in sorted(counts)[:4])
    raise UserError(
      f"the processes have unequal numbers of devices ({given}"
      + ("" if len(counts) <= 4 else ", ...")
      + "): give every process as many"
    )


def _end_at_once(status: int) -> None:
  """Ends the process without parting from the others, so that they notice."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(status)
