"""Frozen dataclasses from nested mappings, and back.

A section that is present is built from its own class's defaults; a section that is absent takes the
default of its parent's field. A field marked `dataclasses.field(metadata={"flatten": True})` holds
a dataclass whose keys live in the parent's section; annotated `X | None`, it is None where none of
its keys is given.
"""

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from moe_jax.choices import did_you_mean, is_utf8
from moe_jax.errors import UserError

_Config = TypeVar("_Config")
_UNIONS = (typing.Union, types.UnionType)
_SCALARS = {bool: "true or false", int: "an int", float: "a float", str: "a string"}


def dataclass_from(cls: type[_Config], mapping: Any, path: str = "config") -> _Config:
  """Builds the dataclass `cls`, and those nested in it, from a mapping.

  An int is accepted for a float, a list for a tuple, an enum by its value; nothing else is
  converted. Floats must be finite and strings encodable as UTF-8: what a config says is written
  as JSON.

  Args:
    cls: a dataclass whose annotations are made of bool, int, float, str, enums, Literal,
      dataclasses, tuples, Optional and Any.
    mapping: a Mapping or ConfigDict from field names to values, nested as `cls` is; an instance of
      `cls` is returned as it is.
    path: the name of this section in error messages.

  Returns:
    An instance of `cls`.

  Raises:
    UserError: a key is unknown or missing, a value has the wrong type, or the dataclass refused its
      values; the message begins with the dotted path of the fault.
  """
  if isinstance(mapping, cls):
    return mapping
  values = section(mapping, path)
  names = _keys(cls)
  for key in values:
    if key not in names:
      raise UserError(f"{path}.{key} is not a field; {did_you_mean(key, names, path + '.')}")
  return _build(cls, values, path)


def section(mapping: Any, path: str) -> dict[str, Any]:
  """Returns the fields of a section as a dict.

  Raises:
    UserError: `mapping` is no section; the message begins with `path`.
  """
  if not _is_mapping(mapping):
    raise UserError(f"{path} is {_show(mapping)}, expected a section with fields of its own")
  return {str(key): mapping[key] for key in mapping.keys()}


def to_mapping(config: Any) -> dict[str, Any]:
  """Turns a dataclass into a nested dict that JSON can hold; `dataclass_from` is its inverse.

  Enums become their values, tuples become lists, flattened fields join their parent.

  Args:
    config: an instance of a dataclass that `dataclass_from` can build.

  Returns:
    A dict of str, int, float, bool, None, lists and dicts.

  Raises:
    TypeError: a field holds something that JSON cannot.
  """
  mapping = {}
  for field in dataclasses.fields(config):
    if not field.init:
      continue
    value = _plain(getattr(config, field.name))
    if _is_flat(field):
      mapping.update(value or {})
    else:
      mapping[field.name] = value
  return mapping


def chosen_fields(config: Any) -> dict[str, Any]:
  """Returns those fields of a config dataclass that differ from their defaults, as for JSON.

  Sections within it likewise; a field without a default is always there.
  """
  chosen = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    if value != default:
      chosen[field.name] = (
        chosen_fields(value) if dataclasses.is_dataclass(value) else _plain(value)
      )
  return chosen


def _build(cls: type, values: dict[str, Any], path: str) -> Any:
  """Calls `cls` with the converted values; prefixes what its own checks raise with `path`."""
  hints = typing.get_type_hints(cls)
  arguments = {}
  for field in dataclasses.fields(cls):
    if not field.init:
      continue
    hint = hints[field.name]
    if _is_flat(field):
      flat = _flattened(hint)
      own = {key: values[key] for key in _keys(flat) if key in values}
      if own or _is_required(field):
        arguments[field.name] = _build(flat, own, path)
    elif field.name in values:
      arguments[field.name] = _convert(hint, values[field.name], f"{path}.{field.name}")
    elif _is_required(field):
      raise UserError(f"{path}.{field.name} is missing, expected {_describe(hint)}")
  try:
    return cls(**arguments)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error


def _keys(cls: type) -> list[str]:
  """Lists the keys that the section of `cls` accepts, those of flattened fields included."""
  hints = typing.get_type_hints(cls)
  names = []
  for field in dataclasses.fields(cls):
    if field.init:
      names += _keys(_flattened(hints[field.name])) if _is_flat(field) else [field.name]
  twice = {name for name in names if names.count(name) > 1}
  if twice:
    raise TypeError(f"{cls.__name__} and what it flattens share the fields {sorted(twice)}")
  return names


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Checks `value` against one annotation and returns it in the annotated type."""
  origin = typing.get_origin(hint)
  if hint is Any:
    return value
  if origin in _UNIONS:
    return _convert_optional(hint, value, path)
  if origin is typing.Literal:
    return _convert_choice(list(typing.get_args(hint)), value, path)
  if origin is tuple or hint is tuple:
    return _convert_tuple(hint, value, path)
  if dataclasses.is_dataclass(hint):
    return dataclass_from(hint, value, path)
  if isinstance(hint, type) and issubclass(hint, enum.Enum):
    value = value.value if isinstance(value, hint) else value
    return hint(_convert_choice([member.value for member in hint], value, path))
  if hint not in _SCALARS:
    raise TypeError(f"{path} is annotated {hint}, which a config cannot hold")
  if not (type(value) is hint or (hint is float and type(value) is int)):
    raise _wrong_type(hint, value, path)
  if hint is str and not is_utf8(value):
    raise UserError(f"{path} is {value!r}, expected text that UTF-8 can encode")
  return _as_float(value, path) if hint is float else value


def _as_float(value: float, path: str) -> float:
  """Returns a finite float: JSON holds no other."""
  try:
    number = float(value)
  except OverflowError:
    number = math.inf
  if not math.isfinite(number):
    raise UserError(f"{path} is {number}, expected a finite float")
  return number


def _convert_optional(hint: Any, value: Any, path: str) -> Any:
  """Converts to `X | None`; a union of several types cannot be told apart and is refused."""
  members = [member for member in typing.get_args(hint) if member is not type(None)]
  if len(members) != 1 or len(typing.get_args(hint)) != 2:
    raise TypeError(f"{path} is annotated {hint}; of unions a config can hold only `X | None`")
  return None if value is None else _convert(members[0], value, path)


def _convert_choice(choices: list[Any], value: Any, path: str) -> Any:
  """Returns `value` when it is one of the choices, type included (True is not 1)."""
  if any(type(value) is type(choice) and value == choice for choice in choices):
    return value
  names = [str(choice) for choice in choices]
  known = f"expected one of {', '.join(names)}"
  hint = did_you_mean(value, names) if isinstance(value, str) else known
  raise UserError(f"{path} is {_show(value)}, {known}" + ("" if hint == known else f"; {hint}"))


def _convert_tuple(hint: Any, value: Any, path: str) -> tuple[Any, ...]:
  """Converts a tuple or list, element by element when the annotation names element types."""
  if not isinstance(value, tuple | list):
    raise _wrong_type(hint, value, path)
  elements = typing.get_args(hint) or (Any, ...)
  if elements[-1] is ...:
    elements = (elements[0],) * len(value)
  if len(elements) != len(value):
    raise _wrong_type(hint, value, path)
  pairs = zip(elements, value, strict=True)
  return tuple(_convert(each, item, f"{path}[{i}]") for i, (each, item) in enumerate(pairs))


def _plain(value: Any) -> Any:
  """Converts one field's value for JSON."""
  if isinstance(value, enum.Enum):
    return _plain(value.value)
  if value is None or type(value) in _SCALARS:
    return value
  if dataclasses.is_dataclass(value):
    return to_mapping(value)
  if isinstance(value, tuple | list):
    return [_plain(item) for item in value]
  if _is_mapping(value):
    return {str(key): _plain(value[key]) for key in value.keys()}
  raise TypeError(f"{_show(value)} of type {type(value).__name__} does not fit in a config")


def _wrong_type(hint: Any, value: Any, path: str) -> UserError:
  return UserError(f"{path} is {_show(value)}, expected {_describe(hint)}")


def _describe(hint: Any) -> str:
  """Names an annotation in the words of an error message."""
  if hint in _SCALARS:
    return _SCALARS[hint]
  arguments = typing.get_args(hint)
  if typing.get_origin(hint) in _UNIONS:
    members = [member for member in arguments if member is not type(None)]
    return " or ".join([_describe(member) for member in members] + ["none"])
  if typing.get_origin(hint) is typing.Literal:
    return f"one of {', '.join(map(str, arguments))}"
  if typing.get_origin(hint) is tuple:
    if arguments[-1] is ...:
      return f"a tuple, each element {_describe(arguments[0])}"
    return f"a tuple of {len(arguments)} values"
  if isinstance(hint, type) and issubclass(hint, enum.Enum):
    return f"one of {', '.join(str(member.value) for member in hint)}"
  return "a section" if dataclasses.is_dataclass(hint) else f"a {getattr(hint, '__name__', hint)}"


def _show(value: Any) -> str:
  """Shows a value briefly; a section is not printed in full."""
  return "a section" if _is_mapping(value) else repr(value)


def _is_mapping(value: Any) -> bool:
  # ConfigDict does not register as a Mapping, and importing it here would tie the core to it.
  return isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__"))


def _is_flat(field: dataclasses.Field) -> bool:
  return bool(field.metadata.get("flatten", False))


def _flattened(hint: Any) -> type:
  """Returns the dataclass of a flattened field, which may be annotated `X | None`."""
  return next((each for each in typing.get_args(hint) if each is not type(None)), hint)


def _is_required(field: dataclasses.Field) -> bool:
  missing = dataclasses.MISSING
  return field.default is missing and field.default_factory is missing
