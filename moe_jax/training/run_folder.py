"""The run folder: which run it belongs to, and small files written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"


def write_json(path: Path, value: Any) -> None:
  """Writes JSON through a temporary file and a rename, so that no reader sees half of it."""
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "w") as file:
    json.dump(value, file, indent=2)
    file.write("\n")
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def check_run(workdir: Path, config: dict[str, Any]) -> None:
  """Checks, without writing, that `workdir` is free or belongs to a run of this config.

  Raises:
    UserError: the folder holds a run of another config (the first difference is named), or files
      that are not a run's.
  """
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f"--workdir={workdir} is a file; expected a folder, for example {workdir}_run")
  if (workdir / CONFIG_FILE).exists():
    difference = _difference(read_config(workdir), json.loads(json.dumps(config)))
    if difference:
      raise UserError(
        f"--workdir={workdir} holds a run of another config ({difference}); give the"
        " same config to resume it, or another workdir"
      )
  elif workdir.is_dir() and any(workdir.iterdir()) and not _only_leftovers(workdir):
    raise UserError(
      f"--workdir={workdir} is not empty and holds no run; give a new folder, for"
      f" example {workdir / 'run'}"
    )


def claim_run(workdir: Path, config: dict[str, Any]) -> None:
  """Makes the run folder and writes its config, unless they are there.

  Raises:
    UserError: the folder cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / CONFIG_FILE).exists():
      write_json(workdir / CONFIG_FILE, config)
  except OSError as error:
    raise UserError(
      f"--workdir={workdir} cannot be written ({error.strerror}); give a folder you may write to"
    ) from error


def read_config(workdir: Path) -> dict[str, Any]:
  """Returns the mapping a run was started with.

  Raises:
    UserError: `workdir` is no run folder, or its config is damaged.
  """
  path = workdir / CONFIG_FILE
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(
      f"{workdir} holds no {CONFIG_FILE}; expected a folder made by moe-jax train"
    ) from None
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}); give another workdir") from error


def _only_leftovers(workdir: Path) -> bool:
  """A run killed before its config was in place leaves only the temporary file."""
  return {path.name for path in workdir.iterdir()} <= {CONFIG_FILE + ".tmp"}


def _difference(old: dict, new: dict, path: str = "config") -> str | None:
  """Names the first field in which two configs differ."""
  for key in sorted(old.keys() | new.keys()):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      if difference := _difference(a, b, f"{path}.{key}"):
        return difference
    elif a != b:
      return f"{path}.{key} is {_show(a)} there and {_show(b)} here"
  return None


def _show(value: Any) -> str:
  return "a section" if isinstance(value, dict) else repr(value)
