"""The command `moe-jax audit`."""

from types import SimpleNamespace

from moe_jax.analysis.causality import audit_router
from moe_jax.errors import UserError
from moe_jax.moe.presets import preset

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
    f" rows of {_LENGTH} tokens, seed {seed};\nthe later tokens of row 0 are changed at three cuts\n"
  )
  print(f"  {'':<12}{'past tokens of row 0 routed otherwise':>40}{'tokens of other rows':>24}")
  leaks = {
    mode: audit_router(config, train=train, shape=(_ROWS, _LENGTH), seed=seed)
    for mode, train in _MODES.items()
  }
  for mode, leak in leaks.items():
    print(f"  {mode:<12}{_percent(leak.future):>40}{_percent(leak.batch):>24}")
  print()
  for mode, leak in leaks.items():
    print(f"verdict, {mode}: {name} {leak.verdict}")


def _at_sample_size(name: str):
  """Returns the preset with few experts, so that they fill up, or as it is where it cannot."""
  own = preset(name)
  try:
    return preset(name, num_experts=min(_EXPERTS, own.num_experts))
  except UserError:
    return own


def _audit_config(mapping, source: str, seed: int) -> None:
  # Imported late: the model's modules take seconds, which --preset does not need.
  from moe_jax.analysis.model_audit import audit_model
  from moe_jax.training.config import experiment_from

  experiment = experiment_from(mapping.to_dict())
  model, length = experiment.model, min(experiment.data.sequence_length, 2 * _LENGTH)
  print(
    f"model {source} at random parameters: {_ROWS} rows of {length} random tokens, seed {seed};\n"
    f"row 0 is changed from token {length // 2} on\n"
  )
  for mode, train in _MODES.items():
    result = audit_model(model, train=train, shape=(_ROWS, length), seed=seed)
    print(f"{mode}: logits change by at most (rounding: {result.tolerance:.1g})")
    print(f"  {'row 0, past':<24}{result.future:.3g}")
    print(f"  {'other rows':<24}{result.batch:.3g}")
    for layer in result.layers:
      print(
        f"  MoE layer {layer.layer:<3} routes otherwise: {_percent(layer.future)} of row 0's past,"
        f" {_percent(layer.batch)} of other rows"
      )
    print(f"verdict, {mode}: the model {result.verdict}\n")


def _percent(share: float) -> str:
  return f"{100 * share:.1f} %"
