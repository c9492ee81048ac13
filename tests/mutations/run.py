"""Breaks the package in the ways in which routers are known to break; each break must fail a test.

  python tests/mutations/run.py            all of them, in about ten minutes
  python tests/mutations/run.py padding    those with the word in their name, file or test

A mutation, of the tables (*.toml) beside this file, replaces one text of one file in a copy of the
repository. Its test must then fail; without it, all tests must pass. Exit status 1 and one of

  SURVIVED  the test passes all the same: nothing guards against this mistake
  STALE     the text does not stand in the file exactly once: the code has moved on
  BROKEN    no test ran: it has another name now, or a module cannot be imported
  HUNG      the test took longer than five minutes
"""

import dataclasses
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import tomllib

# Read by JAX when it is first imported, which is here.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Every test process is a fork of this one: what the package imports is loaded once, not each time.
import flax.nnx  # noqa: E402, F401
import jax.experimental.pallas.ops.tpu.megablox.gmm  # noqa: E402, F401
import jax.experimental.pallas.triton  # noqa: E402, F401
import optax  # noqa: E402, F401
import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "*.egg-info")
SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Mutation:
  """A mistake: `old` in `file` becomes `new`, and `test` (a pytest node) has to notice."""

  name: str
  file: str
  old: str
  new: str
  test: str

  def matches(self, words: list[str]) -> bool:
    """Tells whether all words are in the name, the file or the test."""
    return all(word in f"{self.name} {self.file} {self.test}" for word in words)


def load(words: list[str]) -> list[Mutation]:
  """Returns the mutations of all tables that match the words."""
  tables = sorted(pathlib.Path(__file__).parent.glob("*.toml"))
  entries = [entry for table in tables for entry in tomllib.loads(table.read_text())["mutation"]]
  return [mutation for entry in entries if (mutation := Mutation(**entry)).matches(words)]


def run_tests(tests: list[str], copy: pathlib.Path, seconds: int) -> tuple[int | None, str]:
  """Returns pytest's exit status, None if it took too long, and the first line of the failure."""
  log = copy.with_suffix(".log")
  child = multiprocessing.get_context("fork").Process(target=_child, args=(tests, copy, log))
  child.start()
  child.join(seconds)
  hung = child.is_alive()
  child.kill()
  child.join()
  reasons = [line for line in log.read_text().splitlines() if line.startswith("E  ")]
  return None if hung else child.exitcode, reasons[0][2:].strip() if reasons else ""


def _child(tests, copy, log):
  """Runs pytest in the copy, from whose root it imports the package."""
  with log.open("w") as file:
    for stream in (1, 2):
      os.dup2(file.fileno(), stream)
  os.chdir(copy)
  sys.path.insert(0, str(copy))
  # Compiled files are told apart by size and second, which a mutation may leave as they were.
  sys.dont_write_bytecode = True
  status = pytest.main(["-x", "-p", "no:cacheprovider", *tests])
  sys.exit(int(status))


def outcome(mutation: Mutation, copy: pathlib.Path) -> tuple[str, str]:
  """Applies a mutation, runs its test, and restores the file; returns a word and a reason."""
  path = copy / mutation.file
  text = path.read_text() if path.exists() else ""
  if text.count(mutation.old) != 1:
    return "STALE", f"found {text.count(mutation.old)} times: {mutation.old}"
  path.write_text(text.replace(mutation.old, mutation.new))
  status, reason = run_tests([mutation.test], copy, SECONDS)
  path.write_text(text)
  return {0: "SURVIVED", 1: "caught", None: "HUNG"}.get(status, "BROKEN"), reason


def main(words: list[str]) -> int:
  """Runs the mutations that match the words; returns the exit status."""
  mutations = load(words)
  if not mutations:
    print(f"no mutation matches {' '.join(words)}")
    return 1
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / "copy"
    shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
    tests = sorted({mutation.test for mutation in mutations})
    status, reason = run_tests(tests, copy, SECONDS * len(tests))
    if status != 0:
      print(f"without a mutation the tests do not pass: exit status {status} {reason}")
      return 1
    outcomes = []
    for number, mutation in enumerate(mutations, 1):
      word, reason = outcome(mutation, copy)
      outcomes.append(word)
      print(f"{number:3}/{len(mutations)} {word:8} {mutation.name}")
      print(f"{'':16} {mutation.test.removeprefix('tests/')}\n{'':16} {reason}", flush=True)
  print(", ".join(f"{outcomes.count(word)} {word}" for word in sorted(set(outcomes))))
  return 0 if set(outcomes) == {"caught"} else 1


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
