"""Prepares a data set in a process of its own, and kills it there with SIGKILL.

  python killing_preparation.py SOURCE DATA_DIR CALL

The process kills itself before its CALL-th call of what makes work last (`os.fsync`, `os.replace`,
`os.unlink`) or of the packing of a batch; 0 = never. Shards are small, so that there are many.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from moe_jax.data import ingest
from moe_jax.data.builders import prepare
from moe_jax.data.config import DataConfig

ROOT = Path(__file__).parents[2]
BEGUN = "begun"
# What the files of a data set are when it is complete, the lock aside.
_LOCK = "lock"


def run(source: str, data_dir: str, call: int) -> None:
  """Prepares the source; see the module."""
  ingest._BATCH_BYTES, ingest._SHARD_BYTES = 3000, 12_000
  calls = 0

  def counted(function):
    def counting(*args, **kwargs):
      nonlocal calls
      calls += 1
      if calls == call:
        os.kill(os.getpid(), signal.SIGKILL)
      return function(*args, **kwargs)

    return counting

  for name in ("fsync", "replace", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
  ingest.Ingest._pack = counted(ingest.Ingest._pack)
  config = DataConfig(sources=(source,), sequence_length=32, data_dir=data_dir)
  print(BEGUN, flush=True)
  begun = time.monotonic()
  prepare(config, on_the_way=False)
  print(calls, time.monotonic() - begun)


def start(source: Path, data_dir: Path, call: int = 0) -> subprocess.Popen:
  """Starts the process, and returns once it begins to prepare."""
  words = [sys.executable, __file__, str(source), str(data_dir), str(call)]
  paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  process = subprocess.Popen(
    words,
    env=os.environ | {"PYTHONPATH": paths},
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  assert process.stdout.readline().strip() == BEGUN
  return process


def end(process: subprocess.Popen) -> tuple[int, str]:
  """Waits for the process; returns its status and what it printed."""
  printed, _ = process.communicate(timeout=300)
  return process.returncode, printed


def undisturbed(source: Path, data_dir: Path) -> tuple[int, float]:
  """Prepares to the end; returns the calls that could have been the last, and the seconds."""
  status, printed = end(start(source, data_dir))
  assert status == 0
  calls, seconds = printed.split()
  return int(calls), float(seconds)


def kill_at_call(source: Path, data_dir: Path, call: int) -> bool:
  """Returns whether a start was killed before its `call`-th call; otherwise it came to the end."""
  status, _ = end(start(source, data_dir, call))
  assert status in (0, -signal.SIGKILL)
  return status != 0


def kill_at_any_time(source: Path, data_dir: Path, draw: random.Random, seconds: float) -> bool:
  """Returns whether a start was killed within so many seconds; otherwise it came to the end."""
  process = start(source, data_dir)
  time.sleep(draw.uniform(0, seconds))
  process.kill()
  status, _ = end(process)
  return status != 0


def files_of(data_dir: Path) -> dict[str, bytes]:
  """Returns the files of the only data set under a folder."""
  (folder,) = (data_dir / "packed_text").iterdir()
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != _LOCK}


if __name__ == "__main__":
  run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
