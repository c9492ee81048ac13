"""Named routers, as values of the stages. An ablation changes one field of a preset.

Those of papers stand in `paper_presets.py`, those of other libraries in `library_presets.py`.
"""

import dataclasses

from moe_jax.choices import did_you_mean
from moe_jax.errors import UserError
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.library_presets import LIBRARY_PRESETS
from moe_jax.moe.paper_presets import PAPER_PRESETS

_PRESETS: dict[str, dict] = {**PAPER_PRESETS, **LIBRARY_PRESETS}


def preset(name: str, **overrides) -> RoutingConfig:
  """Returns the routing config of a paper or library, with some fields replaced.

  Raises:
    UserError: an unknown preset or field, naming the nearest one.
  """
  if name not in _PRESETS:
    raise UserError(f"router preset {name!r} does not exist; {did_you_mean(name, _PRESETS)}")
  known = [field.name for field in dataclasses.fields(RoutingConfig)]
  for field in overrides:
    if field not in known:
      raise UserError(f"routing config has no field {field!r}; {did_you_mean(field, known)}")
  fields = {**_PRESETS[name], **overrides}
  return RoutingConfig(**{key: _value(given, fields) for key, given in fields.items()})


def _value(given, fields):
  """Returns a field's value; a preset may give it as a function of the number of experts."""
  return given(fields["num_experts"]) if callable(given) else given


def register_preset(name: str, **fields) -> None:
  """Enters a preset of one's own; see `register_selection` for a selection of one's own.

  Raises:
    UserError: a name that is taken by other values.
  """
  if _PRESETS.get(name, fields) != fields:
    raise UserError(f"router preset {name!r} exists already; choose another name")
  _PRESETS[name] = fields


def preset_names() -> list[str]:
  """Returns the names of all presets."""
  return sorted(_PRESETS)
