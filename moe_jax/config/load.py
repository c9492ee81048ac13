"""Config files: run `get_config()`, then set single fields with the types the file gave them.

`ml_collections.config_flags` types and sets the overrides. The file is run here, because
config_flags buries a file's own error in a traceback and delays a missing file until first use.
"""

import inspect
import runpy
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from moe_jax.choices import nearest
from moe_jax.errors import UserError

_EXPECTED = {
  bool: "true or false",
  int: "an int",
  float: "a number",
  str: "a string",
  tuple: "a tuple such as '(1, 2)'",
}


def load_config(source: str) -> config_dict.ConfigDict:
  """Runs a config file and returns what its `get_config` returns.

  Args:
    source: "FILE" or "FILE:VARIANT"; the variant is passed to `get_config` as a string.

  Returns:
    A locked ConfigDict: its fields can change, no field can be added.

  Raises:
    UserError: there is no such file, the variant is unknown, or the file failed.
  """
  path, _, variant = source.partition(":")
  get_config = run_file(path).get("get_config")
  if not callable(get_config):
    raise UserError(f"{path} has no function get_config(), which a config file must define")
  config = _call_get_config(get_config, path, variant)
  if not isinstance(config, config_dict.ConfigDict):
    raise UserError(
      f"get_config() of {path} returned {type(config).__name__}, expected an"
      " ml_collections ConfigDict"
    )
  try:
    return config.lock()
  except config_dict.RequiredValueError as error:
    # config_flags reads a field before it sets it, and reading this kind raises while it is unset.
    raise UserError(
      f"{path} uses required_placeholder, which no override can set; use placeholder(TYPE)"
    ) from error


def override(config: config_dict.ConfigDict, field: str, text: str) -> None:
  """Sets one field from text, parsed as the type that the field has.

  "none" clears any field but a string, where it is a string like any other.

  Args:
    config: changed in place.
    field: the dotted path inside the config, without the leading "config.".
    text: the value as written on the command line.

  Raises:
    UserError: no such field, a section or an untyped field, or text of another type.
  """
  given = f"--config.{field}={text}"
  kind = _field_type(config, field, given)
  if text.lower() == "none" and kind is not str:
    config.update_from_flattened_dict({field: None})
    return
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=[given])
    values(["moe-jax", given])
  except (flags.Error, TypeError, ValueError) as error:
    raise UserError(f"{given}: {text!r} is not {_EXPECTED[kind]}") from error


def run_file(path: str) -> dict[str, Any]:
  """Executes a file and returns its globals.

  Raises:
    UserError: there is no such file, or it failed; names the exception.
  """
  if not Path(path).is_file():
    raise UserError(f"--config={path}: there is no file {path}; {_nearest_file(path)}")
  try:
    return runpy.run_path(path, run_name="config_file")
  except UserError:
    raise
  # SystemExit is no Exception: a file that ends the program would pass for a success.
  except (Exception, SystemExit) as error:
    raise UserError(f"{path} failed with {_in_one_line(error)}") from error


def _call_get_config(get_config: Any, path: str, variant: str) -> Any:
  """Calls `get_config` with the variant, if any; says when the two do not fit."""
  arguments = [variant] if variant else []
  try:
    inspect.signature(get_config).bind(*arguments)
  except TypeError as error:
    fault = (
      f"takes no variant; use --config={path}"
      if variant
      else (f"needs a variant; use --config={path}:VARIANT")
    )
    raise UserError(f"{path} {fault}") from error
  shown = f"{path}:{variant}" if variant else path
  try:
    return get_config(*arguments)
  except ValueError as error:
    raise UserError(f"--config={shown}: {error}") from error
  except (Exception, SystemExit) as error:
    raise UserError(f"--config={shown} failed with {_in_one_line(error)}") from error


def _field_type(config: config_dict.ConfigDict, field: str, given: str) -> type:
  """Walks to the field and returns its type; refuses what cannot be set from text."""
  section = config
  *parents, name = field.split(".")
  for part in parents:
    if not isinstance(section, config_dict.ConfigDict) or part not in section:
      raise _unknown_field(config, field, given)
    section = section[part]
  if not isinstance(section, config_dict.ConfigDict) or name not in section:
    raise _unknown_field(config, field, given)
  kind = section.get_type(name)
  if issubclass(kind, config_dict.ConfigDict):
    inner = next(iter(section[name]), "FIELD")
    raise UserError(f"{given}: {field} is a section; set its fields, as --config.{field}.{inner}=")
  if kind not in _EXPECTED:
    raise UserError(
      f"{given}: {field} is a {kind.__name__} in the config file, which text cannot set;"
      " use a tuple, or config_dict.placeholder(TYPE) for None, there"
    )
  return kind


def _unknown_field(config: config_dict.ConfigDict, field: str, given: str) -> UserError:
  """Names the field nearest in spelling, or one of the same last name in another section."""
  fields = _all_fields(config)
  name = field.rpartition(".")[2]
  namesakes = [known for known in fields if known.rpartition(".")[2] == name]
  close = nearest(field, namesakes or fields) or (namesakes[0] if namesakes else None)
  hint = f"did you mean --config.{close}?" if close else f"its fields are {', '.join(config)}"
  return UserError(f"{given}: the config has no field {field}; {hint}")


def _all_fields(config: config_dict.ConfigDict, prefix: str = "") -> dict[str, Any]:
  """Maps the dotted path of every field and section to its value, references left as such."""
  fields = {}
  for name, value in config.items(preserve_field_references=True):
    fields[prefix + name] = value
    if isinstance(value, config_dict.ConfigDict):
      fields |= _all_fields(value, f"{prefix}{name}.")
  return fields


def _nearest_file(path: str) -> str:
  """Suggests an existing config file, by path first and by bare name second."""
  folders = dict.fromkeys([Path(path).parent, Path("configs")])
  files = sorted({file for folder in folders for file in folder.glob("*.py")})
  by_stem = {file.stem: file.as_posix() for file in files if file.stem != "__init__"}
  close = nearest(Path(path).stem, by_stem)
  if close is not None:
    return f"did you mean {by_stem[close]}?"
  if not by_stem:
    return f"no config file lies in {' or '.join(map(str, folders))} either"
  return f"expected one of {', '.join(by_stem.values())}"


def _in_one_line(error: BaseException) -> str:
  """Shows an exception with its type: a bare KeyError message says nothing on its own."""
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text}" if text else type(error).__name__
