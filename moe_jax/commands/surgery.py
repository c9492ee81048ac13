"""The commands `moe-jax convert upcycle | prune | merge | grow`."""

from collections.abc import Sequence
from types import SimpleNamespace

import jax
import numpy as np

from moe_jax.choices import as_choice
from moe_jax.commands.surgery_source import Source, read_source
from moe_jax.commands.surgery_target import Made, check_request, finish
from moe_jax.convert.surgery import (
  Alignment,
  NewExpert,
  Operation,
  Similarity,
  UpcycleOptions,
  approximations,
  choose_layers,
  expert_operation,
  grown,
  kept,
  layers_of,
  merged,
  moe_layers,
  resized_config,
  upcycled_config,
  upcycling,
  weight_norms,
  with_output_scale,
  without,
)
from moe_jax.errors import UserError
from moe_jax.models import ModelConfig
from moe_jax.moe.presets import preset

# The experts of each MoE layer of the target.
Layers = Sequence[Sequence[NewExpert]]


def upcycle(args: SimpleNamespace) -> None:
  """Makes a run with experts from a dense one.

  Raises:
    UserError: see `moe_jax.convert.surgery.upcycling`.
  """
  names = ("parts", "shared_parts", "noise", "reinit", "router", "router_std", "scaling")
  options = UpcycleOptions(**{name: getattr(args, name) for name in names})
  asked = {"num_experts": args.num_experts, "top_k": args.top_k}
  routing = preset(args.preset, **{name: v for name, v in asked.items() if v is not None})
  check_request(args)
  source = read_source(args)
  old = source.config.model
  base = upcycled_config(old, routing, choose_layers(old, args.layers), options)

  def operation(model: ModelConfig) -> Operation:
    return upcycling(old, model, options, jax.random.key(args.seed))

  def scaled(model: ModelConfig) -> ModelConfig:
    if model.moe.routing.weight_scale != routing.weight_scale and options.scaling == "router":
      raise UserError(
        f"--set=moe.weight_scale={model.moe.routing.weight_scale:g} contradicts --scaling=router,"
        " which sets it; use --scaling=none to choose it"
      )
    return with_output_scale(model, options)

  made = Made("upcycle", base, operation, scaled, lambda model: approximations(model, options))
  finish(args, source, made)


def prune(args: SimpleNamespace) -> None:
  """Makes a run with fewer experts from one with more.

  Raises:
    UserError: not exactly one of --num_experts and --drop, or experts that cannot go.
  """
  if (args.num_experts is None) == (not args.drop):
    raise UserError(
      "moe-jax convert prune takes --num_experts=N, how many of each layer stay, or --drop=IDS"
    )
  check_request(args)
  source = read_source(args)
  _check_smaller(source, args.num_experts)
  layers = _left_after(args.drop, source) if args.drop else _best(args, source)
  _replace_experts(args, "prune", source, layers)


def merge(args: SimpleNamespace) -> None:
  """Makes a run whose experts are means of clusters of experts.

  Raises:
    UserError: a model or a number of experts that does not fit.
  """
  by, align = as_choice(Similarity, "by", args.by), as_choice(Alignment, "align", args.align)
  check_request(args)
  source = read_source(args)
  _check_smaller(source, args.num_experts)
  layers = zip(moe_layers(source.leaves, source.config.model), source.usage(args), strict=True)
  made = [merged(layer, usage, args.num_experts, by, align) for layer, usage in layers]
  _replace_experts(args, "merge", source, made)


def grow(args: SimpleNamespace) -> None:
  """Makes a run with more experts from one with fewer.

  Raises:
    UserError: a model or a number of experts that does not fit.
  """
  if args.init not in ("copy", "fresh"):
    raise UserError(f"--init={args.init} is not one of copy, fresh")
  check_request(args)
  source = read_source(args)
  experts = _num_experts(source)
  if args.num_experts <= experts:
    raise UserError(
      f"--num_experts={args.num_experts} is refused: the model has {experts}; expected more"
    )
  copies = args.init == "copy"
  use = source.usage(args) if copies else _no_use(source)
  made = [grown(each, args.num_experts, copies=copies, noise=args.noise) for each in use]
  _replace_experts(args, "grow", source, made, args.router_std)


def _replace_experts(
  args: SimpleNamespace, name: str, source: Source, layers: Layers, router_std: float = 0.02
) -> None:
  old = source.config.model

  def operation(model: ModelConfig) -> Operation:
    return expert_operation(old, model, layers, jax.random.key(args.seed), router_std)

  def unchanged(model: ModelConfig) -> ModelConfig:
    return model

  finish(args, source, Made(name, resized_config(old, len(layers[0])), operation, unchanged, None))


def _num_experts(source: Source) -> int:
  """Returns E of the source, which must have experts."""
  config = source.config.model
  resized_config(config, config.moe.routing.num_experts if config.moe else 0)
  return config.moe.routing.num_experts


def _no_use(source: Source) -> list[np.ndarray]:
  return [np.zeros(_num_experts(source))] * len(layers_of(source.config.model, "moe"))


def _check_smaller(source: Source, count: int | None) -> None:
  """Refuses a number of experts that is no smaller one, or leaves a token without its K."""
  experts, routing = _num_experts(source), source.config.model.moe.routing
  if count is not None and not 1 <= count < experts:
    raise UserError(
      f"--num_experts={count} is refused: the model has {experts}; expected 1 to {experts - 1}"
    )
  if count is not None and count < routing.top_k:
    raise UserError(
      f"--num_experts={count} is refused: every token takes top_k = {routing.top_k} experts; keep"
      f" at least {routing.top_k}"
    )


def _best(args: SimpleNamespace, source: Source) -> Layers:
  """Returns the experts of each layer that are used most, or have the largest weights."""
  if args.by not in ("usage", "norm"):
    raise UserError(f"--by={args.by} is not one of usage, norm")
  if args.by == "norm":
    scores = [weight_norms(layer) for layer in moe_layers(source.leaves, source.config.model)]
  else:
    scores = source.usage(args)
  return [kept(each, args.num_experts) for each in scores]


def _left_after(texts: Sequence[str], source: Source) -> Layers:
  """Returns the experts that --drop leaves: ids for all layers, or LAYER:IDS for each of them."""
  config, experts = source.config.model, _num_experts(source)
  numbers = layers_of(config, "moe")
  if len(texts) == 1 and ":" not in texts[0]:
    ids = [_ids(texts[0])] * len(numbers)
  else:
    by_layer = {}
    for text in texts:
      layer, colon, listed = text.partition(":")
      if not (colon and layer.isdecimal()):
        raise UserError(f"--drop={text} is refused: expected LAYER:IDS in each, such as 1:0,3")
      if int(layer) in by_layer:
        raise UserError(f"--drop names layer {int(layer)} twice; name all of its experts at once")
      by_layer[int(layer)] = _ids(listed)
    if sorted(by_layer) != numbers:
      raise UserError(
        f"--drop names the layers {sorted(by_layer)}; expected {numbers}, all that have experts"
      )
    ids = [by_layer[number] for number in numbers]
  counts = sorted({len(each) for each in ids})
  if len(counts) > 1:
    raise UserError(
      f"--drop takes {counts[0]} experts from one layer and {counts[-1]} from another; all layers"
      " have the same number, so drop as many from each"
    )
  _check_smaller(source, experts - counts[0])
  return [without(experts, each) for each in ids]


def _ids(text: str) -> list[int]:
  try:
    return sorted({int(each) for each in text.split(",")})
  except ValueError:
    raise UserError(f"--drop={text} is refused: expected ids of experts, such as 0,3") from None
