"""Where a run was made: `origin.json` in its folder, and what sets two such places apart."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from moe_jax.errors import UserError
from moe_jax.provenance import package_versions, source_commit
from moe_jax.training.run_folder import write_json

ORIGIN_FILE = "origin.json"


@dataclasses.dataclass(frozen=True)
class Origin:
  """What decides the numbers of a run beside its config.

  Attributes:
    commit: of this code; None outside a checkout.
    packages: versions by name, Python's among them.
    device: kind.
    devices: how many, of all processes.
    processes: how many.
    data: fingerprint of the prepared data.
  """

  commit: str | None
  packages: dict[str, str]
  device: str
  devices: int
  processes: int
  data: str


def origin_here(data_fingerprint: str) -> Origin:
  """Returns the origin of a run that is made by this process and those that have joined it."""
  return Origin(
    commit=source_commit(),
    packages=package_versions(),
    device=jax.devices()[0].device_kind,
    devices=jax.device_count(),
    processes=jax.process_count(),
    data=data_fingerprint,
  )


def record_origin(workdir: Path, origin: Origin) -> None:
  """Adds an origin to those of a run, unless the run was last worked on in the same one."""
  origins = read_origins(workdir)
  if not origins or origins[-1] != origin:
    entries = [dataclasses.asdict(each) for each in (*origins, origin)]
    write_json(workdir / ORIGIN_FILE, {"origins": entries})


def read_origins(workdir: Path) -> list[Origin]:
  """Returns where a run was worked on, in order; empty without a record.

  Raises:
    UserError: the record is damaged.
  """
  path = workdir / ORIGIN_FILE
  if not path.exists():
    return []
  try:
    return [Origin(**entry) for entry in json.loads(path.read_bytes())["origins"]]
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(
      f"{path} is damaged or of another version of moe_jax ({type(error).__name__}: {error});"
      " delete that file to do without it"
    ) from error


def differences(there: Origin, here: Origin) -> list[str]:
  """Returns one line for each thing that differs, the data not among them."""
  names = ("commit", "device", "devices", "processes")
  pairs = {name: (getattr(there, name), getattr(here, name)) for name in names}
  for name in sorted(there.packages.keys() | here.packages.keys()):
    pairs[name] = there.packages.get(name), here.packages.get(name)
  return [
    f"{name}: {_shown(a)} there, {_shown(b)} here" for name, (a, b) in pairs.items() if a != b
  ]


def check_same_data(run: Path, there: Origin, here: Origin) -> None:
  """Refuses to repeat a run on other data.

  Raises:
    UserError: the prepared data are other ones.
  """
  if there.data != here.data:
    raise UserError(
      f"--replay={run} trained on data of fingerprint {there.data[:12]}, and its config gives"
      f" {here.data[:12]} here: bring back its corpus, tokenizer and version of moe_jax"
      f" ({there.commit or 'not recorded'}), or train by --config instead"
    )


def _shown(value: Any) -> str:
  return "absent" if value is None else str(value)
