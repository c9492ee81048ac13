"""A tiny run in two processes of two devices each, started as the README says.

As a program: `python tiny_processes.py FATE WORDS...` is `moe-jax WORDS`, but for its fate: it
`lives`, or `dies`, by SIGKILL, or `ends`, by SIGTERM, at step 6, when the checkpoint of step 4 is
whole.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from training import tiny

# One block with experts: every program compiles in seconds.
RUN = dict(
  steps=8,
  eval__every=100,
  checkpoint__every=4,
  model__segments=(("attention:moe", 1),),
  model__scan_unroll=1,
  moe__grouping="sequence",
)
# The mesh of the README's lines.
MESH = dict(layout="ep_fsdp", fsdp=2, expert=2)
DIES_AT, KEPT = 6, 4
FATES = {"dies": signal.SIGKILL, "ends": signal.SIGTERM}


def free_port() -> int:
  """Returns a port that nobody listens on now."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def several_processes() -> list[str]:
  """Returns the README's lines of several processes: two by hand, then one of Slurm."""
  lines = (tiny.ROOT / "README.md").read_text().splitlines()
  return [line for line in lines if "--coordinator=" in line or line.startswith("srun ")]


def as_in_readme(line: str, workdir: Path, port: int) -> tuple[list[str], dict[str, str]]:
  """Returns the words after `moe-jax` of such a line, of a tiny run, and its variables."""
  before, _, after = line.removesuffix(" &").partition(" moe-jax ")
  words = shlex.split(after)
  words = [re.sub("^--workdir=.*", f"--workdir={workdir}", word) for word in words]
  words = [re.sub("^--coordinator=.*", f"--coordinator=localhost:{port}", word) for word in words]
  # The tiny sizes last, so that they win.
  words += tiny.command(workdir, **RUN)[3:]
  return words, dict(word.split("=") for word in before.split() if word.startswith("JAX_"))


def slurm(process: int, port: int) -> dict[str, str]:
  """Returns what Slurm tells one of two processes of a job step on this host."""
  return {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": str(process),
    "SLURM_LOCALID": str(process),
    "JAX_COORDINATOR_PORT": str(port),
  }


def start(words: list[str], variables: dict[str, str], fate: str = "lives") -> subprocess.Popen:
  """Starts a process of a run, with output to be read from its pipes."""
  environment = tiny.environment(JAX_NUM_CPU_DEVICES="2", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
  return subprocess.Popen(
    [sys.executable, __file__, fate, *words],
    cwd=tiny.ROOT,
    env=environment | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def cache(folder: Path) -> dict[str, str]:
  """Returns variables by which processes keep compiled programs for those that come later."""
  return {
    "JAX_COMPILATION_CACHE_DIR": str(folder),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def finish(processes: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str, str]]:
  """Returns (status, output, errors) of each, all ended within the time or killed after it."""
  try:
    results = [process.communicate(timeout=seconds) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(p.returncode, *result) for p, result in zip(processes, results, strict=True)]


def _signal_in_time(fate: signal.Signals, workdir: Path) -> None:
  """Makes this process send itself a signal at a step of its training."""
  from moe_jax.training import loop

  check = loop.check_finite

  def last_words(step, metrics):
    if step == DIES_AT:
      while not (workdir / "checkpoints" / str(KEPT)).is_dir():
        time.sleep(0.01)
      os.kill(os.getpid(), fate)
    check(step, metrics)

  loop.check_finite = last_words


def _no_bits(text: bytes, primer: bytes) -> float:
  return 0.0


if __name__ == "__main__":
  from moe_jax.cli import main
  from moe_jax.commands import summary

  # It takes five seconds, and has nothing to do with processes.
  summary.xz_primed_bits_per_byte = _no_bits
  fate, *command = sys.argv[1:]
  if fate in FATES:
    (folder,) = (word.partition("=")[2] for word in command if word.startswith("--workdir="))
    _signal_in_time(FATES[fate], Path(folder))
  sys.exit(main(command))
