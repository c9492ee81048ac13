"""The run folder: which run it belongs to, and small files written whole or not at all."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from moe_jax.errors import UserError

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
_LOCK_FILE = ".lock"
_REMAKE_SUMMARY = "delete that file and train again to have it made anew"
# Sections and fields of a config that change nothing a run has written or will write.
_NO_CONTENTS = (
  "report",
  "checkpoint",
  "imports",
  "sharding",
  "data.data_dir",
  "faults",
  "log.tensorboard",
  "log.wandb",
  "log.trackio",
  "log.profile",
)
_TRIES, _SECONDS_BETWEEN_TRIES = 5, 0.1
# What a run that was killed before its config was in place leaves.
_BEFORE_CONFIG = frozenset({_LOCK_FILE, CONFIG_FILE + ".tmp"})


def write_json(path: Path, value: Any) -> None:
  """Writes JSON through a temporary file and a rename, so that no reader sees half of it."""
  text = json.dumps(value, indent=2, allow_nan=False) + "\n"
  temporary = path.with_name(path.name + ".tmp")
  try:
    with open(temporary, "w") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def check_run(workdir: Path, config: dict[str, Any]) -> None:
  """Checks, without writing, that `workdir` is free or belongs to a run of this config.

  Raises:
    UserError: the folder holds a run of another config (the first difference is named) or files
      that are not a run's, or it cannot be written.
  """
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f"--workdir={workdir} is a file; expected a folder, for example {workdir}_run")
  _check_links(workdir)
  place = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
  if not (place.is_dir() and os.access(place, os.W_OK)):
    raise UserError(
      f"--workdir={workdir} cannot be made: {place} is not a folder you may write to; give another"
      " workdir"
    )
  if (workdir / CONFIG_FILE).exists():
    difference = _difference(identity(read_config(workdir)), identity(config))
    if difference:
      raise UserError(
        f"--workdir={workdir} holds a run of another config ({CONFIG_FILE}: {difference});"
        " give the same config to resume it, or another workdir"
      )
  elif workdir.is_dir() and any(path.name not in _BEFORE_CONFIG for path in workdir.iterdir()):
    raise UserError(
      f"--workdir={workdir} is not empty and holds no run; give a new folder, for"
      f" example {workdir / 'run'}"
    )


@contextlib.contextmanager
def claim_run(workdir: Path, config: dict[str, Any]) -> Iterator[None]:
  """Makes the run folder, writes its config, and keeps other processes out while it is held.

  The kernel frees the lock even of a killed process.

  Raises:
    UserError: the folder cannot be written, another process is training in it, or it holds a run
      of another config.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = (workdir / _LOCK_FILE).open("w")
  except OSError as error:
    raise UserError(
      f"--workdir={workdir} cannot be written ({error.strerror}); give a folder you may write to"
    ) from error
  with lock:
    if not _locked(lock):
      raise UserError(
        f"--workdir={workdir}: another process is training there; wait for it, or give another"
        " workdir"
      )
    # Another process may have begun a run of its own since the folder was last checked.
    check_run(workdir, config)
    if not (workdir / CONFIG_FILE).exists() or read_config(workdir) != _as_json(config):
      write_json(workdir / CONFIG_FILE, config)
    yield


def _locked(file: IO) -> bool:
  """Takes the lock of a run folder, unless it stays taken.

  Who only looks whether it is taken (see `is_claimed`) holds it for a moment too.
  """
  for _ in range(_TRIES):
    with contextlib.suppress(BlockingIOError):
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
    time.sleep(_SECONDS_BETWEEN_TRIES)
  return False


def _check_links(workdir: Path) -> None:
  for folder in (workdir, *workdir.parents):
    if folder.is_symlink() and not folder.exists():
      raise UserError(
        f"--workdir={workdir} cannot be made: {folder} is a link to {os.readlink(folder)}, which is"
        " not there; make that folder, or give another workdir"
      )


def is_claimed(workdir: Path) -> bool:
  """Tells whether a process of this host is training in a run folder."""
  path = workdir / _LOCK_FILE
  if not path.exists():
    return False
  with path.open() as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
  return False


def check_joined_run(workdir: Path, config: dict[str, Any]) -> None:
  """Checks that a process which joins a run sees the folder of the one that claimed it.

  Raises:
    UserError: it sees another folder, or has another config, also in what does not decide the
      contents of a run.
  """
  if not (workdir / CONFIG_FILE).exists():
    raise UserError(
      f"--workdir={workdir} is not the folder that process 0 writes: give all processes one folder"
      " on a file system that they share"
    )
  if difference := _difference(read_config(workdir), _as_json(config)):
    raise UserError(
      f"--workdir={workdir}: process 0 trains another config ({CONFIG_FILE}: {difference}); give"
      " all processes the same one"
    )


def read_config(workdir: Path) -> dict[str, Any]:
  """Returns the mapping a run was started with.

  Raises:
    UserError: `workdir` is no run folder, or its config is damaged.
  """
  path = workdir / CONFIG_FILE
  if not path.exists():
    raise UserError(f"{workdir} holds no {CONFIG_FILE}; expected a folder made by moe-jax train")
  return _read_object(path, "give another workdir")


def read_summary(workdir: Path) -> dict[str, Any]:
  """Returns the summary of a finished run.

  Raises:
    UserError: the file is damaged.
  """
  return _read_object(workdir / SUMMARY_FILE, _REMAKE_SUMMARY)


def damaged_summary(workdir: Path, error: Exception) -> UserError:
  """Explains that the summary is JSON, but not of the contents that a run writes."""
  return _damaged(workdir / SUMMARY_FILE, f"{type(error).__name__}: {error}", _REMAKE_SUMMARY)


def _read_object(path: Path, remedy: str) -> dict[str, Any]:
  try:
    content = json.loads(path.read_bytes())
  except ValueError as error:
    raise _damaged(path, error, remedy) from error
  if not isinstance(content, dict):
    raise _damaged(path, f"{content!r:.40} is no JSON object", remedy)
  return content


def _damaged(path: Path, reason: Any, remedy: str) -> UserError:
  return UserError(f"{path} is damaged ({reason}); {remedy}")


def identity(config: dict[str, Any]) -> dict[str, Any]:
  """Returns what decides the contents of a run: its metrics, parameters, summary.

  Where its data, checkpoints and modules lie, how many are kept, which devices work on it, and how
  it is shown are not among them.
  Which steps are logged and which text is sampled are: one file cannot hold two answers.
  """
  kept = _as_json(config)
  for name in _NO_CONTENTS:
    section, _, field = name.partition(".")
    if not field:
      kept.pop(section, None)
    elif isinstance(kept.get(section), dict):
      kept[section].pop(field, None)
  return kept


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the config as it reads back: tuples become lists."""
  return json.loads(json.dumps(config))


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
