"""Kills a run of two processes at random, also inside checkpoint writes, and compares the outcome.

  python -m experiments.faults.kill_test --kills=30 --seed=0

Claim: final parameters and the metrics of every step (wall-clock ones apart) equal those of an
undisturbed run, bit for bit. Half of the kills wait for a checkpoint that is being written. The
outcome is in kill_test.json beside this file; 396 seconds on 2 CPU cores.
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

import jax

ROOT = Path(__file__).parents[2]
SHORT = ["--config.checkpoint.every=2"]
SUMMARY = Path(__file__).with_suffix(".json")


def main() -> None:
  """Kills, compares, and writes the summary; ends with an AssertionError where runs differ."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  # The helpers of the tests start the processes.
  sys.path.insert(0, str(ROOT / "tests"))
  from distributed.killing import assert_equal_runs, kill_once, rows, run_to_the_end

  draw, moments, began = random.Random(args.seed), collections.Counter(), time.monotonic()
  # Each kill comes at most some steps after the last checkpoint: the run outlasts them all.
  further = [*SHORT, f"--config.steps={5 * args.kills}"]
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    run_to_the_end(folder / "whole", folder / "compiled", further)
    for kill in range(args.kills):
      moment = kill_once(
        folder / "killed", folder / "compiled", draw, writing=kill % 2 == 0, further=further
      )
      moments[moment] += 1
      print(f"kill {kill + 1} of {args.kills}: inside a {moment}", flush=True)
    run_to_the_end(folder / "killed", folder / "compiled", further)
    assert_equal_runs(folder / "killed", folder / "whole")
    goodput = json.loads((folder / "killed" / "goodput.json").read_text())
    summary = {
      "kills": args.kills,
      "seed": args.seed,
      "moments": dict(sorted(moments.items())),
      "steps": len(rows(folder / "whole")),
      "starts": len(goodput["starts"]),
      "equal_bit_for_bit": True,
      "seconds": round(time.monotonic() - began),
      "jax": jax.__version__,
      "python": platform.python_version(),
    }
  SUMMARY.write_text(json.dumps(summary, indent=2) + "\n")
  print(json.dumps(summary, indent=2))


if __name__ == "__main__":
  main()
