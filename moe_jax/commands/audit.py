"""The command `moe-jax audit`."""

import textwrap
from types import SimpleNamespace

from ml_collections import ConfigDict

from moe_jax.analysis.causality import audit_router
from moe_jax.analysis.model_audit import audit_model
from moe_jax.errors import UserError
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.presets import preset
from moe_jax.training.config import experiment_from

_WIDTH = 100
_ROWS, _LENGTH = 4, 64
_EXPERTS = 16
_MODES = {"training": True, "evaluation": False}


def audit(args: SimpleNamespace) -> None:
  """Changes later tokens and prints what leaks into earlier ones.

  Raises:
    UserError: not exactly one of --config and --preset.
  """
  if (args.config is None) == (args.preset is None):
    given = "both" if args.preset is not None else "neither"
    raise UserError(f"moe-jax audit takes --config=FILE or --preset=NAME; {given} was given")
  if args.preset is not None:
    _audit_preset(args.preset, args.seed)
  else:
    _audit_config(args.config, args.config_source, args.seed)


def _audit_preset(name: str, seed: int) -> None:
  config = _at_sample_size(name)
  print(
    f"router {name}, {config.num_experts} experts, K = {config.top_k}: random logits of {_ROWS}"
    f" rows of {_LENGTH} tokens, seed {seed};\n"
    "the later tokens of row 0 are changed, at three cuts\n"
  )
  for mode, train in _MODES.items():
    leak = audit_router(config, train=train, shape=(_ROWS, _LENGTH), seed=seed)
    print(f"{mode}: {_shares(leak.future, leak.batch)}")
    _print_verdict(mode, f"the router {leak.verdict}")


def _at_sample_size(name: str) -> RoutingConfig:
  """Returns the preset with few experts, so that they fill up, or as it is where it cannot."""
  own = preset(name)
  try:
    return preset(name, num_experts=min(_EXPERTS, own.num_experts))
  except UserError:
    return own


def _audit_config(mapping: ConfigDict, source: str, seed: int) -> None:
  experiment = experiment_from(mapping.to_dict())
  if experiment.model.encoder is not None:
    raise UserError(f"{source} is an encoder-decoder, whose encoder sees later tokens by design")
  length = min(experiment.data.sequence_length, 2 * _LENGTH)
  print(
    f"model {source} at random parameters: {_ROWS} rows of {length} random tokens, seed {seed};\n"
    f"row 0 is changed from token {length // 2} on\n"
  )
  for mode, train in _MODES.items():
    result = audit_model(experiment.model, train=train, shape=(_ROWS, length), seed=seed)
    print(
      f"{mode}: logits move by up to {result.future:.3g} in row 0's past and {result.batch:.3g} in"
      f" other rows ({result.tolerance:.1g} is rounding)"
    )
    for layer in result.layers:
      print(f"  MoE layer {layer.layer}: {_shares(layer.future, layer.batch)}")
    _print_verdict(mode, f"the model {result.verdict}")


def _shares(future: float, batch: float) -> str:
  return (
    f"{100 * future:.1f} % of row 0's past and {100 * batch:.1f} % of other rows' tokens are routed"
    " otherwise"
  )


def _print_verdict(mode: str, text: str) -> None:
  print(textwrap.fill(f"verdict, {mode}: {text}", _WIDTH, subsequent_indent="  ") + "\n")
