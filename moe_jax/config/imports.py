"""A user's own modules, imported before a config is read: they register selections and presets."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.choices import did_you_mean
from moe_jax.config.schema import dataclass_from
from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Imports:
  imports: tuple[str, ...] = ()


def import_modules(mapping: Mapping[str, Any]) -> None:
  """Imports the modules that a config's mapping names in `imports`, in order.

  A module is imported once a process, however often it is named. It is looked for where Python
  looks, and in the current folder after that (`find_in_current_folder`).

  Raises:
    UserError: no list of names, a name that is no module's, a module that is not found, or one
      that fails; the message begins with the place of the name.
  """
  given = {name: value for name, value in mapping.items() if name == "imports"}
  for index, name in enumerate(dataclass_from(_Imports, given, "config").imports):
    _import(name, f"config.imports[{index}] = {name!r}")


def find_in_current_folder() -> None:
  """Lets imports find modules in the current folder, which an installed command does not do.

  Last, so that a file of the user's called `queue.py` cannot stand in for the standard library.
  """
  if not {"", os.getcwd()} & set(sys.path):
    sys.path.append("")


def _import(name: str, given: str) -> None:
  dotted = name.removesuffix(".py").replace("/", ".")
  if name != dotted or not all(part.isidentifier() for part in name.split(".")):
    example = dotted if all(part.isidentifier() for part in dotted.split(".")) else "routers.mine"
    raise UserError(f"{given} is not the name of a module, expected one such as {example!r}")
  importlib.invalidate_caches()
  try:
    importlib.import_module(name)
  except UserError as error:
    raise UserError(f"{given}: {error}") from error
  except ModuleNotFoundError as error:
    # A module that itself lacks another one is there, and has failed.
    if error.name is None or not f"{name}.".startswith(f"{error.name}."):
      raise _failed(given, error) from error
    near = did_you_mean(name, sorted(path.stem for path in Path.cwd().glob("*.py")))
    raise UserError(
      f"{given}: there is no such module; run moe-jax in the folder that holds it, or put that"
      f" folder on PYTHONPATH; {near}"
    ) from error
  # SystemExit is no Exception: a module that ends the program would pass for a success.
  except (Exception, SystemExit) as error:
    raise _failed(given, error) from error


def _failed(given: str, error: BaseException) -> UserError:
  text = " ".join(str(error).split())
  return UserError(f"{given} failed on import with {type(error).__name__}: {text}")
