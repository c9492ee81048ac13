"""A world without a cloud: the stand-in gcloud first on the PATH, and what it has recorded."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


class World:
  """A folder with a `bin` that comes first on the PATH.

  Attributes:
    folder: holds what the stand-in knows.
  """

  def __init__(self, folder: Path, **script):
    self.folder = folder
    (folder / "bin").mkdir(parents=True)
    (folder / "script.json").write_text(json.dumps({"hosts": 1, "ports": [], **script}))
    self.program("gcloud", f'exec "{sys.executable}" "{HERE / "fake_gcloud.py"}" "$@"')

  def program(self, name: str, line: str) -> None:
    """Puts a program of one shell line on the PATH."""
    path = self.folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)

  def environment(self) -> dict[str, str]:
    """Returns the variables of a process that lives in this world."""
    path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "FAKE_GCLOUD": str(self.folder), "PYTHONPATH": str(ROOT)}

  def launch(self, *words: str, seconds: float = 900) -> subprocess.CompletedProcess:
    """Runs the launcher to its end."""
    return subprocess.run(
      [sys.executable, "-m", "experiments.cloud.tpu", *words],
      cwd=ROOT,
      env=self.environment(),
      capture_output=True,
      text=True,
      timeout=seconds,
    )

  def calls(self) -> list[list[str]]:
    """Returns the commands that reached the stand-in, without `gcloud`."""
    path = self.folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def verbs(self) -> list[str]:
    """Returns what was asked about slices, runs of equal verbs once."""
    found = [call[3] for call in self.calls() if call[0] == "compute"]
    return [v for i, v in enumerate(found) if i == 0 or found[i - 1] != v]


def real_gcloud() -> str | None:
  """Returns the path of Google's own command-line interface, if it is installed."""
  return shutil.which("gcloud")


def faults_of(calls: list[list[str]]) -> list[str]:
  """Returns what the grammar of the installed gcloud finds wrong, without account or network.

  The linter ends with status 0 even where it finds faults, so its answer is what counts.
  """
  lines = [shlex.join(["gcloud", *call]) for call in _kinds(calls)]
  with tempfile.TemporaryDirectory() as empty:
    path = Path(empty) / "commands.json"
    path.write_text(json.dumps([{"command_string": line} for line in lines]))
    variables = {"CLOUDSDK_CONFIG": empty, "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1"}
    words = [real_gcloud(), "meta", "lint-gcloud-commands", f"--commands-file={path}"]
    environment = os.environ | variables
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
  answers = json.loads(done.stdout)
  assert len(answers) == len(lines), "the linter has not read every command"
  return [f"{a['command_string']}: {a['error_message']}" for a in answers if not a["success"]]


def _kinds(calls: list[list[str]]) -> list[list[str]]:
  """Returns one command of each verb and set of flags; their values are free text to the linter."""

  def kind(call):
    command = next((w.split()[2] for w in call if w.startswith("--command=")), "")
    return tuple(word.partition("=")[0] for word in call if word[0] == "-"), *call[:4], command

  return list({kind(call): call for call in calls}.values())


REQUEST = (
  "--name=run-1",
  "--project=project-1",
  "--zone=us-east5-a",
  "--accelerator=v5p-16",
  "--pause=0.1",
  "--install=image",
)
