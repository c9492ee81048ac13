"""The settings of a checkpoint of the hub, `config.json`: aliases, defaults, rotary positions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.choices import did_you_mean
from moe_jax.convert.hub_types import check_setting
from moe_jax.errors import UserError
from moe_jax.layers.mlp import Activation
from moe_jax.layers.rope_scaling import RopeScaling, RopeScalingKind

CONFIG_FILE = "config.json"
_NEEDED = object()

# Keys of one meaning: families and years differ.
_ALIASES = (
  ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
  ("num_experts_per_tok", "num_experts_per_token", "moe_top_k"),
  ("hidden_size", "d_model"),
  ("num_hidden_layers", "n_layers"),
  ("num_attention_heads", "n_heads"),
  ("num_key_value_heads", "kv_n_heads"),
  ("router_aux_loss_coef", "moe_loss_weight"),
  ("num_nextn_predict_layers", "num_mtp_layers"),
)
_ALIASES_OF = {name: names for names in _ALIASES for name in names}

# "gelu" is the exact one to the hub, the tanh approximation here.
_ACTIVATIONS = {
  "silu": Activation.SILU,
  "swish": Activation.SILU,
  "gelu": Activation.GELU_EXACT,
  "gelu_new": Activation.GELU,
  "gelu_pytorch_tanh": Activation.GELU,
  "gelu_fast": Activation.GELU,
  "gelu_accurate": Activation.GELU,
  "gelu_python": Activation.GELU_EXACT,
  "gelu_python_tanh": Activation.GELU,
  "quick_gelu": Activation.QUICK_GELU,
  "relu": Activation.RELU,
  "relu2": Activation.SQUARED_RELU,
}

# Names of the fields of `RopeScaling` where the hub has others.
_SCALING_KEYS = {
  "factor": "factor",
  "original_max_position": "original_max_position_embeddings",
  "beta_fast": "beta_fast",
  "beta_slow": "beta_slow",
  "truncate": "truncate",
  "mscale": "mscale",
  "mscale_all_dim": "mscale_all_dim",
  "attention_factor": "attention_factor",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "short_factors": "short_factor",
  "long_factors": "long_factor",
}
_FIELDS_OF = {
  RopeScalingKind.LINEAR: ("factor",),
  RopeScalingKind.YARN: tuple(list(_SCALING_KEYS)[:8]),
  RopeScalingKind.LLAMA3: (
    "factor",
    "original_max_position",
    "low_freq_factor",
    "high_freq_factor",
  ),
  RopeScalingKind.LONGROPE: (
    "factor",
    "original_max_position",
    "short_factors",
    "long_factors",
    "attention_factor",
  ),
}


class HubConfig:
  """Reads the settings of one model; an absent and a null setting are the same.

  They differ where the original's class has a value for what is absent and another meaning of null:
  `with_defaults` enters those values.
  """

  def __init__(self, values: Mapping[str, Any]):
    self.values = dict(values)

  def get(self, name: str, default: Any = _NEEDED) -> Any:
    """Returns a setting under this name or one of its aliases.

    Raises:
      UserError: it is of another type than such settings are, or absent without a default.
    """
    for alias in _ALIASES_OF.get(name, (name,)):
      if self.values.get(alias) is not None:
        check_setting(alias, self.values[alias], CONFIG_FILE)
        return self.values[alias]
    if default is _NEEDED and name in self.values:
      raise UserError(f"{CONFIG_FILE} has {name} = null; expected a value")
    if default is _NEEDED:
      raise UserError(f"{CONFIG_FILE} has no {name!r}; {did_you_mean(name, self.values)}")
    return default

  def with_defaults(self, **defaults: Any) -> "HubConfig":
    """Returns the settings with these where the file has none; a null one stays null."""
    absent = {
      name: value
      for name, value in defaults.items()
      if not any(alias in self.values for alias in _ALIASES_OF.get(name, (name,)))
    }
    return HubConfig({**self.values, **absent})

  def each_layer(self, name: str, default: list[Any], kinds: tuple[Any, ...] = ()) -> list[Any]:
    """Returns a list that has one entry a layer, `default` if it is absent or empty.

    Raises:
      UserError: it has another length than `default`, or an entry that is not one of `kinds`.
    """
    given = self.get(name, []) or default
    for each in given:
      if kinds and each not in kinds:
        raise UserError(
          f"{CONFIG_FILE} has {each!r} among {name}, which is not supported;"
          f" {did_you_mean(str(each), map(str, kinds))}"
        )
    if len(given) != len(default):
      raise UserError(
        f"{CONFIG_FILE} has {len(given)} {name}, expected num_hidden_layers = {len(default)}"
      )
    return given

  def section(self, name: str) -> "HubConfig":
    """Returns the settings of a nested section, empty if it is absent."""
    return HubConfig(self.get(name, {}))

  def only(self, name: str, *values: Any) -> None:
    """Refuses a setting with another value than these; absent, it has the first of them.

    Raises:
      UserError: another value, which would change the results.
    """
    given = self.get(name, values[0])
    if given not in values:
      wanted = " or ".join(json.dumps(value) for value in values)
      raise UserError(
        f"{CONFIG_FILE} has {name} = {json.dumps(given)}, which is not supported: expected {wanted}"
      )

  def activation(self, name: str = "hidden_act", default: str = "silu") -> Activation:
    """Returns the nonlinearity, that of the name `default` if it is absent."""
    given = str(self.get(name, default))
    if given not in _ACTIVATIONS:
      raise UserError(
        f"{CONFIG_FILE} has {name} = {given!r}, which is not supported;"
        f" {did_you_mean(given, _ACTIVATIONS)}"
      )
    return _ACTIVATIONS[given]

  def rope(
    self, default_theta: float = 10_000.0, *, partial: bool = False
  ) -> tuple[float, RopeScaling | None]:
    """Returns theta and the scaling.

    Reads `rope_parameters`, which holds everything, and the older `rope_theta` beside
    `rope_scaling`, whose kind is called "rope_type" or "type" and which wins where both are given.

    Args:
      default_theta: where the file has none.
      partial: whether the family rotates a part of a head, see `rotated_part`. The code of the
        others rotates all of it whatever the file says, and a file that says otherwise is refused.

    Raises:
      UserError: a kind of scaling that is not one of `RopeScalingKind`, one of each layer type, or
        a part of a head.
    """
    settings = self.rope_settings()
    given = HubConfig(settings)
    if not partial and self.rotated_part() != 1.0:
      raise UserError(
        f"{CONFIG_FILE} has partial_rotary_factor = {self.rotated_part()}, which is not supported:"
        " expected 1.0"
      )
    if nested := [name for name, value in settings.items() if isinstance(value, dict)]:
      raise UserError(
        f"{CONFIG_FILE} has rope settings for {', '.join(nested)} apart, which is not supported:"
        " expected the same for all layers"
      )
    theta = given.get("rope_theta", self.get("rope_theta", default_theta))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
      return float(theta), None
    if kind not in list(RopeScalingKind):
      raise UserError(
        f"{CONFIG_FILE} has the rope scaling {kind!r}, which is not supported: expected one of"
        f" default, {', '.join(RopeScalingKind)}"
      )
    return float(theta), self._scaling(RopeScalingKind(kind), given)

  def rotated_part(self, default: float = 1.0) -> float:
    """Returns the part of a head that is rotated."""
    own = self.get("partial_rotary_factor", default)
    return float(HubConfig(self.rope_settings()).get("partial_rotary_factor", own))

  def rope_settings(self) -> dict[str, Any]:
    """Returns the settings of rotary positions that stand together, in either style."""
    given = self.get("rope_scaling", None) or self.get("rope_parameters", {})
    for name, value in given.items():
      if value is not None:
        check_setting(name, value, CONFIG_FILE)
    return given

  def _scaling(self, kind: RopeScalingKind, given: "HubConfig") -> RopeScaling:
    fields = {name: given.get(_SCALING_KEYS[name], None) for name in _FIELDS_OF[kind]}
    if "original_max_position" in fields:
      original = self.get("original_max_position_embeddings", fields["original_max_position"])
      fields["original_max_position"] = original or self.get("max_position_embeddings")
    if not fields["factor"]:
      length = self.get("max_position_embeddings")
      original = fields.get("original_max_position", length)
      if not (length and original):
        raise UserError(
          f"{CONFIG_FILE} has max_position_embeddings = {length} and"
          f" original_max_position_embeddings = {original}: expected lengths above 0"
        )
      fields["factor"] = length / original
    if "truncate" in fields:
      fields["truncate"] = bool(given.values.get("truncate", True))
    for name in {"short_factors", "long_factors"} & set(fields):
      fields[name] = tuple(map(float, fields[name] or ()))
    # Zero stands for absent in released files.
    return RopeScaling(kind, **{name: v for name, v in fields.items() if v or v is False})


def write_activation(activation: Activation) -> str:
  """Returns the hub's name of a nonlinearity.

  Raises:
    UserError: it has none.
  """
  for name, kind in _ACTIVATIONS.items():
    if kind == activation:
      return name
  raise UserError(
    f"activation = {activation} has no name on the hub; expected one of"
    f" {', '.join(dict.fromkeys(_ACTIVATIONS.values()))}"
  )


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
  """Returns the settings of rotary positions in the older style, which all releases read."""
  if scaling is None:
    return {"rope_theta": theta, "rope_scaling": None}
  values = {_SCALING_KEYS[name]: getattr(scaling, name) for name in _FIELDS_OF[scaling.kind]}
  kind = {"rope_type": str(scaling.kind), "type": str(scaling.kind)}
  settings = {
    "rope_theta": theta,
    "rope_scaling": kind
    | {
      name: list(value) if isinstance(value, tuple) else value
      for name, value in values.items()
      if value is not None
    },
  }
  if scaling.original_max_position is not None:
    length = round(scaling.factor * scaling.original_max_position)
    settings["max_position_embeddings"] = length
  return settings


def read_hub_config(folder: Path) -> HubConfig:
  """Reads `config.json` of a checkpoint folder.

  Raises:
    UserError: the folder or the file is missing, or the file is no JSON object.
  """
  path = folder / CONFIG_FILE
  if not folder.is_dir():
    raise UserError(f"{folder} is not a folder; expected one that holds {CONFIG_FILE}")
  if not path.is_file():
    raise UserError(f"{folder} has no {CONFIG_FILE}; expected a folder that a model was saved to")
  return HubConfig(read_object(path))


def read_object(path: Path) -> dict[str, Any]:
  """Returns the settings of a JSON file, none if there is no such file.

  Raises:
    UserError: the file is no JSON object.
  """
  if not path.is_file():
    return {}
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not valid JSON ({error}); save or download it again") from None
  if not isinstance(values, dict):
    raise UserError(f"{path} holds {type(values).__name__}; expected a JSON object of settings")
  return values
