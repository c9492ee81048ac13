"""`moe-jax train --replay`: a run that was, trained again from what its folder says."""

from pathlib import Path
from typing import Any

from moe_jax.config import import_modules
from moe_jax.errors import UserError
from moe_jax.sharding.processes import is_first_process
from moe_jax.training.origin import (
  ORIGIN_FILE,
  Origin,
  check_same_data,
  differences,
  read_origins,
)
from moe_jax.training.run_folder import read_config


def config_to_replay(run: Path, workdir: Path) -> dict[str, Any]:
  """Returns the config of a run, whose imports it has imported.

  Raises:
    UserError: there is no such run, or the new one would be in the same folder.
  """
  if run.resolve() == workdir.resolve():
    raise UserError(f"--replay={run} is the --workdir itself; give the new run another folder")
  mapping = read_config(run)
  import_modules(mapping)
  return mapping


def compare_origin(run: Path, here: Origin) -> None:
  """Says, one line each, what is other here than where a run was made.

  Raises:
    UserError: the data are other ones: no replay could equal the run.
  """
  origins = read_origins(run)
  lines = [] if origins else [f"it holds no {ORIGIN_FILE}, so versions and data are not compared"]
  if len(origins) > 1:
    lines.append(f"it was resumed in other places ({len(origins)} in all); compared with the first")
  if origins:
    check_same_data(run, origins[0], here)
    lines += differences(origins[0], here)
  if is_first_process():
    for line in lines:
      print(f"replaying {run}: {line}")
