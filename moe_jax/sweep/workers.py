"""Runs of a sweep as processes of their own, a few at a time.

A process each, so that a run is resumed like any other, a crash costs one run, and each has a core
to itself. One vmapped program for all seeds would be slower on a CPU, see
`experiments.benchmarks.vmapped_seeds`. Several sweeps may work on one folder, on one host or
several that share it: a run that another holds is left to it.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moe_jax.errors import UserError
from moe_jax.training.run_folder import is_claimed

_POLL_SECONDS = 0.5
_LAST_LINES = 3
_BIND = (
  "import os, sys; os.sched_setaffinity(0, map(int, sys.argv[1].split(',')));"
  " os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclasses.dataclass(frozen=True)
class Job:
  """A run as a process.

  Attributes:
    name: of the run.
    command: the words that run it.
    folder: the run folder, which the process claims.
    log: file for what it prints.
    is_done: tells whether its card is there.
    may_start: tells whether the run that it starts from is done.
  """

  name: str
  command: tuple[str, ...]
  folder: Path
  log: Path
  is_done: Callable[[], bool]
  may_start: Callable[[], bool] = lambda: True


def run_jobs(jobs: Sequence[Job], workers: int, on_done: Callable[[Job], None]) -> None:
  """Runs all jobs, so many at a time, and waits for those that other sweeps are at.

  Args:
    jobs: in the order in which to start them.
    workers: processes at a time; each is bound to cores of its own where there are enough.
    on_done: called after each job whose card is there.

  Raises:
    UserError: a job failed; what it printed last is told, and no further one is started.
  """
  waiting, running, free = list(jobs), {}, _shares_of_cores(workers)
  with contextlib.ExitStack() as stack:
    while waiting or running:
      for job in [job for job in waiting if job.is_done()]:
        waiting.remove(job)
        on_done(job)
      ready = [job for job in waiting if job.may_start() and not is_claimed(job.folder)]
      for job in ready[: len(free)]:
        waiting.remove(job)
        cores = free.pop()
        running[job] = stack.enter_context(_started(job, cores)), cores
      time.sleep(_POLL_SECONDS)
      for job, (process, cores) in list(running.items()):
        if process.poll() is None:
          continue
        free.append(cores)
        del running[job]
        waiting.insert(0, job)
        if not job.is_done() and not is_claimed(job.folder):
          raise _failure(job, process.returncode)


@contextlib.contextmanager
def _started(job: Job, cores: frozenset[int] | None) -> Iterator[subprocess.Popen]:
  """Starts a job; tells it to save and end if the sweep ends before it."""
  job.log.parent.mkdir(parents=True, exist_ok=True)
  # Bound by a program that becomes the run: threads that start later inherit its cores, and code
  # between fork and exec of a process with threads, as this one, may deadlock.
  bound = () if cores is None else (sys.executable, "-c", _BIND, ",".join(map(str, sorted(cores))))
  with job.log.open("a") as log:
    process = subprocess.Popen(
      (*bound, *job.command), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
  try:
    yield process
  finally:
    if process.poll() is None:
      process.terminate()
    process.wait()


def _shares_of_cores(workers: int) -> list[frozenset[int] | None]:
  """Returns the cores of each worker; None, any, where there are fewer cores than workers."""
  cores = sorted(os.sched_getaffinity(0))
  if workers > len(cores):
    return [None] * workers
  return [frozenset(cores[worker::workers]) for worker in reversed(range(workers))]


def _failure(job: Job, status: int) -> UserError:
  lines = [line for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
  said = " / ".join(lines[-_LAST_LINES:]) or "nothing"
  return UserError(
    f"run {job.name} ended with status {status} and said: {said}; {job.log} has the rest, and the"
    " same command goes on from what is done"
  )


def command_of(
  config: str, profile: str, index: int, workdir: Path, cards: Path
) -> tuple[str, ...]:
  """Returns the command line that does one run of a sweep."""
  flags = (f"--config={config}", f"--profile={profile}", f"--index={index}")
  folders = (f"--workdir={workdir}", f"--cards={cards}")
  return (sys.executable, "-m", "moe_jax.cli", "sweep", *flags, *folders)
