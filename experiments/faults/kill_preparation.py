"""Kills `moe-jax data prepare` at random with SIGKILL, and compares what it leaves in the end.

  python -m experiments.faults.kill_preparation --kills=20 --seed=0

Claim: the files of a data set whose preparation was killed, any number of times, equal those of an
undisturbed one byte for byte. Every other kill comes just before a random call that makes work last
(fsync, replace, unlink) or packs a batch, the rest at a random time. The outcome is in
kill_preparation.json beside this file.
"""

import argparse
import collections
import json
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SUMMARY = Path(__file__).with_suffix(".json")
_COPIES = 30


def main() -> None:
  """Kills, compares, and writes the summary; ends with an AssertionError where files differ."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  # The helpers of the tests start the processes.
  sys.path.insert(0, str(ROOT / "tests"))
  from data import killing_preparation as killing
  from data.texts import TEXTS, json_lines

  draw, moments, began = random.Random(args.seed), collections.Counter(), time.monotonic()
  with tempfile.TemporaryDirectory() as scratch:
    source = Path(scratch) / "texts"
    source.mkdir()
    for i in range(_COPIES):
      (source / f"{i:02d}.jsonl").write_bytes(json_lines([text * 3 for text in TEXTS]))
    calls, seconds = killing.undisturbed(source, Path(scratch) / "whole")
    expected = killing.files_of(Path(scratch) / "whole")
    finished = 0
    while moments.total() < args.kills:
      killed = Path(scratch) / f"killed{finished}"
      while moments.total() < args.kills and _kill(killing, source, killed, draw, calls, seconds):
        moments[_moment(killing.files_of(killed))] += 1
        print(f"kill {moments.total()} of {args.kills}: {dict(moments)}", flush=True)
      killing.undisturbed(source, killed)
      assert killing.files_of(killed) == expected
      finished += 1
  summary = {
    "kills": args.kills,
    "seed": args.seed,
    "moments": dict(sorted(moments.items())),
    "data_sets": finished,
    "files": len(expected),
    "equal_byte_for_byte": True,
    "seconds": round(time.monotonic() - began),
    "python": platform.python_version(),
  }
  SUMMARY.write_text(json.dumps(summary, indent=2) + "\n")
  print(json.dumps(summary, indent=2))


def _kill(
  killing: ModuleType, source: Path, killed: Path, draw: random.Random, calls: int, seconds: float
) -> bool:
  """Starts a preparation; returns whether it was killed before it came to its end."""
  if draw.random() < 0.5:
    return killing.kill_at_call(source, killed, draw.randint(1, calls))
  return killing.kill_at_any_time(source, killed, draw, seconds)


def _moment(files: dict[str, bytes]) -> str:
  """Tells from what a kill has left where it was."""
  if "manifest.json" in files:
    return "after the manifest"
  if any(name.endswith(".partial") for name in files):
    return "inside a shard"
  return "between shards" if files.get("journal.jsonl") else "before the first shard"


if __name__ == "__main__":
  main()
