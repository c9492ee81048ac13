"""Whole config files from a few fields: what a file leaves out is filled in.

A command line can set only fields that a config has, and a file that lists them all hides the few
that matter. So a file says what it is about, and every other field gets its default here.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from moe_jax.choices import nearest
from moe_jax.config import to_mapping
from moe_jax.errors import UserError
from moe_jax.moe import MoEConfig
from moe_jax.training.config import ExperimentConfig, experiment_from

# A run that ends within seconds on a CPU: to see an architecture train, not to learn language.
TINY_RUN = {
  "steps": 100,
  "batch_size": 8,
  "data": {"sequence_length": 64},
  "optimizer": {"learning_rate": 3e-3, "warmup_steps": 10},
  "eval": {"every": 100, "batch_size": 64},
  "checkpoint": {"every": 100, "keep": 1},
  "sample": {"max_new_tokens": 40},
}

# What published sizes share: one length for all, so that FLOPs can be compared. Steps, batch and
# optimiser are left at their defaults: no paper's recipe is claimed.
PUBLISHED_RUN = {"data": {"sequence_length": 4096}}
PUBLISHED_MODEL = {"dtype": "bfloat16", "remat": "full"}


def choose_variant(name: str, variants: Mapping[str, Any]) -> Any:
  """Returns the variant of that name.

  Raises:
    UserError: there is none; the message names them all.
  """
  if name not in variants:
    close = nearest(name, variants)
    hint = f"; did you mean {close}?" if close else ""
    raise UserError(f"variant {name!r} is not one of {', '.join(variants)}{hint}")
  return variants[name]


def full_config(fields: Mapping[str, Any]) -> config_dict.ConfigDict:
  """Returns a config file's mapping with every field that it leaves out at its default.

  Args:
    fields: as a config file has them: `model`, `moe` beside it, `data` and the other sections.

  Returns:
    A ConfigDict. A field that is None is a placeholder of its type; a section that is None is
    left out, and so is a vocabulary that the tokenizer decides.

  Raises:
    UserError: the fields make no experiment.
  """
  whole = to_mapping(experiment_from(fields))
  moe = whole["model"].pop("moe")
  if "vocab_size" not in fields["model"]:
    del whole["model"]["vocab_size"]
  whole = _settable(ExperimentConfig, whole)
  if moe is not None:
    whole["moe"] = _settable(MoEConfig, moe)
  return config_dict.ConfigDict(whole)


def _settable(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a section in types that text can set; see `full_config` for None."""
  hints, whole = typing.get_type_hints(cls), {}
  for field in dataclasses.fields(cls):
    kind = _without_none(hints[field.name])
    if field.metadata.get("flatten"):
      whole |= _settable(kind, values)
    elif field.name in values:
      value = values[field.name]
      if dataclasses.is_dataclass(kind):
        if value is not None:
          whole[field.name] = _settable(kind, value)
      else:
        # A placeholder knows tuples, and not of what.
        plain = typing.get_origin(kind) or kind
        whole[field.name] = config_dict.placeholder(plain) if value is None else _tupled(value)
  return whole


def _without_none(hint: Any) -> Any:
  return next((each for each in typing.get_args(hint) if each is not type(None)), hint)


def _tupled(value: Any) -> Any:
  """Makes tuples of lists, at every depth."""
  return tuple(_tupled(each) for each in value) if isinstance(value, list) else value
