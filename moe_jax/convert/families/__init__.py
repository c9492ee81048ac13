"""The families of checkpoints, and which of them a config or a folder belongs to."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.choices import did_you_mean
from moe_jax.convert.families.dbrx import DBRX
from moe_jax.convert.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moe_jax.convert.families.deepseek_v1 import DEEPSEEK_V1
from moe_jax.convert.families.glm4 import GLM4_MOE
from moe_jax.convert.families.gpt_oss import GPT_OSS
from moe_jax.convert.families.granite import GRANITE
from moe_jax.convert.families.jamba import JAMBA
from moe_jax.convert.families.llama import LLAMA, MISTRAL
from moe_jax.convert.families.llama4 import LLAMA4
from moe_jax.convert.families.llama4_vision import LLAMA4_MULTIMODAL
from moe_jax.convert.families.mixtral import MIXTRAL
from moe_jax.convert.families.nllb import NLLB_MOE
from moe_jax.convert.families.olmoe import OLMOE
from moe_jax.convert.families.phi import PHIMOE
from moe_jax.convert.families.qwen import QWEN2_MOE, QWEN3_MOE
from moe_jax.convert.families.switch import SWITCH
from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import CONFIG_FILE, HubConfig
from moe_jax.convert.rules import uncovered
from moe_jax.errors import UserError
from moe_jax.layers.mamba_config import MambaConfig
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.models import ModelConfig
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.options import BiasUpdate, Score, Weighting

FAMILIES = (
  *(MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V1, DEEPSEEK_V2, DEEPSEEK_V3, LLAMA4),
  LLAMA4_MULTIMODAL,
  *(GRANITE, DBRX, GLM4_MOE, GPT_OSS, PHIMOE, JAMBA, SWITCH, NLLB_MOE),
)
# Read, to be upcycled, and never written.
_DENSE = (LLAMA, MISTRAL)

_MOST_DIFFERENCES = 4
# What says how to train or to compute, and not which function the parameters are.
_TRAINING = {
  ModelConfig: ("dropout", "init_scale", "dtype", "remat", "scan_unroll"),
  FeedForwardConfig: ("dropout",),
  MambaConfig: ("scan_chunk",),
  MoEConfig: (
    *("expert_dropout", "router_jitter", "router_init", "router_dtype"),
    *("dispatch", "grouped_kernel"),
  ),
  RoutingConfig: (
    *("noise", "noise_std", "bias_rate", "grouping", "group_size", "priority", "drop_order"),
    *("capacity_convention", "capacity_factor", "eval_capacity_factor", "capacity_rounding"),
    *("min_capacity", "capacity_multiple", "reroute_attempts", "balance_fraction"),
    *("balance_source", "balance_scope", "importance", "load_threshold", "loss_padding"),
    *("balance_loss_weight", "z_loss_weight", "importance_loss_weight", "load_loss_weight"),
    *("device_loss_weight", "communication_loss_weight"),
    *("adaptive_target", "adaptive_factor"),
  ),
}


def family_in(hub: HubConfig) -> Family:
  """Returns the family that a `config.json` names.

  Raises:
    UserError: it names none that is known, with the nearest one.
  """
  named = [*hub.get("architectures", []), *filter(None, [hub.get("model_type", None)])]
  for family in FAMILIES + _DENSE:
    if family.architecture in named or family.model_type in named:
      return family
  known = [family.architecture for family in FAMILIES + _DENSE]
  name = named[0] if named else ""
  given = f"the architecture {name!r}, which is not known" if name else "no architecture"
  raise UserError(f"{CONFIG_FILE} names {given}; {did_you_mean(name, known)}")


def family_of(config: ModelConfig) -> Family:
  """Returns the family whose checkpoints can hold a model of this config.

  It is the one whose settings, written and read back, give the config again, apart from how it is
  trained and computed.

  Raises:
    UserError: no family has such models; the nearest one is named, and what it has otherwise.
  """
  if config.moe is None:
    raise UserError(
      f"segments = {config.segments} has no experts; only models with some can be converted"
    )
  if config.mtp_depth:
    raise UserError(
      f"mtp_depth = {config.mtp_depth} cannot be converted: give a config with mtp_depth = 0, which"
      " leaves out the layers of multi-token prediction, that only training uses"
    )
  faults = {}
  for family in FAMILIES:
    faults[family.architecture] = found = list(_differences(family, config))
    if not found:
      return family
  # Other mixers are one difference in words, and the largest in fact.
  far = ("mixers", "encoder", "vision tower")
  nearest = min(
    faults, key=lambda name: (any(word in faults[name][0] for word in far), len(faults[name]))
  )
  shown = "; ".join(faults[nearest][:_MOST_DIFFERENCES])
  raise UserError(
    f"no architecture of the hub has models of this config; the nearest is {nearest}, for which"
    f" the config would need {shown}"
  )


def _differences(family: Family, config: ModelConfig) -> Iterator[str]:
  """Yields what the config would need to be one of the family's."""
  used = {block[0] for block in config.layers()}
  if family.encoder_decoder != (config.encoder is not None):
    yield "an encoder" if family.encoder_decoder else "no encoder"
    return
  if family.vision != (config.vision is not None):
    yield "a vision tower" if family.vision else "no vision tower"
    return
  if not used <= set(family.mixers):
    yield f"mixers among {', '.join(family.mixers)} instead of {', '.join(sorted(used))}"
    return
  try:
    wanted = _meaning(family.read(HubConfig(family.write(config))))
  except UserError as error:
    yield f"settings that exist ({error})"
    return
  given = _meaning(config)
  for name in dict.fromkeys([*wanted, *given]):
    if wanted.get(name) != given.get(name):
      yield f"{name} = {wanted.get(name)} instead of {given.get(name)}"
  for place in uncovered(family.rules, config):
    yield f"no {place}"


def _meaning(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that decide what a model computes, flat, by their dotted names."""
  config = dataclasses.replace(config, segments=_shortest(config.layers()))
  if config.encoder is not None:
    encoder = dataclasses.replace(
      config.encoder, segments=_shortest(config.encoder_stack().layers())
    )
    config = dataclasses.replace(config, encoder=encoder)
  if config.moe.routing.bias_update != BiasUpdate.NONE:
    config = config.with_routing(bias_update=BiasUpdate.SIGN)
  routing = config.moe.routing
  # Over a softmax the two are the same numbers.
  if routing.score == Score.SOFTMAX and routing.weighting == Weighting.SOFTMAX_SELECTED:
    config = config.with_routing(weighting=Weighting.RENORMALIZED)
  return dict(_flat("", config))


def _shortest(layers: list[tuple[str, ...]]) -> tuple[tuple[str, int], ...]:
  return as_segments([":".join(block) for block in layers])


def _flat(prefix: str, section: Any) -> Iterator[tuple[str, Any]]:
  for field in dataclasses.fields(section):
    name, value = prefix + field.name, getattr(section, field.name)
    if field.name in _TRAINING.get(type(section), ()):
      continue
    if dataclasses.is_dataclass(value):
      yield from _flat(name + ".", value)
    else:
      yield name, value


def architecture_settings(family: Family, config: ModelConfig) -> Mapping[str, Any]:
  """Returns the `config.json` of a model, as a mapping."""
  return {
    "architectures": [family.architecture],
    "model_type": family.model_type,
    **family.write(config),
  }
