"""Plans every case with `moe-jax plan`, each in a process of its own, and keeps what it printed.

From the repository's root, with the extra `tpu` installed; minutes a case on two cores:
  python -m experiments.pods.compile_all [--only=TEXT]
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from experiments.pods.cases import CASES, SEARCH, Case

RESULTS = Path(__file__).parent / "results"
# No accelerator is looked for, and other processes may compile at the same time.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def result_file(case: Case) -> Path:
  """Returns where the result of a case lies."""
  words = f"{case.config} {case.topology} {' '.join(case.words)}"
  name = "".join(char if char.isalnum() else "_" for char in words).strip("_")
  return RESULTS / f"{name}.json"


def run_case(case: Case) -> dict:
  """Runs one command; returns what it printed, its peak resident memory and CPU time."""
  command = [sys.executable, "-m", "moe_jax.cli", *case.command, "--json"]
  with subprocess.Popen(
    command,
    env=os.environ | _ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    out, err = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise RuntimeError(f"{' '.join(case.command)} failed: {err[-2000:]}")
  printed = json.loads(out[out.index("{") :])
  return {
    "command": case.command,
    "resident_gib": usage.ru_maxrss / 2**20,
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "printed": printed,
  }


def main() -> None:
  """Runs the cases whose name, config or topology contains the given text."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", default="", help="part of a case's name, config or words")
  only = parser.parse_args().only
  RESULTS.mkdir(exist_ok=True)
  for case in (*CASES, SEARCH):
    if only not in f"{case.name} {' '.join(case.command)}":
      continue
    result = run_case(case)
    result_file(case).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{case.name} on {case.topology}: {result['resident_gib']:.2f} GiB resident")


if __name__ == "__main__":
  main()
