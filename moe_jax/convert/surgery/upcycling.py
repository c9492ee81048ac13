"""Dense feed-forwards become mixtures of experts: the configs, and what of it is exact.

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055) copies a dense network into every expert.
Variants: experts of a part of its hidden units each, with a router that picks one copy of every
part (virtual groups, He et al., arXiv 2410.07524), and re-initialised units (Drop-Upcycling,
Nakamura et al., arXiv 2502.19261). `experts_from_dense` makes the arrays.
"""

import dataclasses
import enum
import math

import jax

from moe_jax.choices import as_choice, did_you_mean
from moe_jax.convert.family import as_segments
from moe_jax.convert.surgery.combine_scale import has_fixed_total, weight_total
from moe_jax.convert.surgery.experts_from_dense import DenseToExperts
from moe_jax.convert.surgery.operation import Operation, block_words, layers_of
from moe_jax.errors import UserError
from moe_jax.models import ModelConfig
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.dispatch import Dispatch
from moe_jax.moe.layer import MoEConfig, SharedCombine
from moe_jax.moe.options import Overflow, Projection
from moe_jax.moe.registry import Chooser


class RouterStart(enum.StrEnum):
  """How the columns of a new router are drawn; their standard deviation is `router_std`."""

  NORMAL = "normal"  # every column by itself
  VIRTUAL_GROUPS = "virtual_groups"  # one for all parts of a copy: they are picked together


class Scaling(enum.StrEnum):
  """What makes up for combine weights that do not add up to 1 for every part."""

  ROUTER = "router"  # the router's weight_scale; expert weights stay copies
  WEIGHTS = "weights"  # the experts' last matrix and its bias, as in arXiv 2410.07524
  NONE = "none"  # nothing


@dataclasses.dataclass(frozen=True)
class UpcycleOptions:
  """How the experts of a layer come from its dense network.

  Attributes:
    parts: G, how many equal parts the hidden units are cut into; an expert has one of them.
    shared_parts: the first so many parts become a shared expert, which every token visits.
    noise: standard deviation of what is added to every expert's arrays, relative to the root mean
      square of the array.
    reinit: the fraction r of an expert's hidden units that start anew, other ones in each expert.
    router: how the router starts.
    router_std: of its columns. A small one, such as 1e-4, is a router of zeros with noise that
      breaks the ties.
    scaling: what keeps the scale of the output.
  """

  parts: int = 1
  shared_parts: int = 0
  noise: float = 0.0
  reinit: float = 0.0
  router: RouterStart = RouterStart.NORMAL
  router_std: float = 0.02
  scaling: Scaling = Scaling.ROUTER

  def __post_init__(self):
    for name, kind in {"router": RouterStart, "scaling": Scaling}.items():
      object.__setattr__(self, name, as_choice(kind, name, getattr(self, name)))
    if self.parts < 1:
      raise UserError(f"parts = {self.parts} is refused: it must be at least 1")
    if not 0 <= self.shared_parts < self.parts:
      raise UserError(
        f"shared_parts = {self.shared_parts} is refused: it must be from 0 to {self.parts - 1},"
        f" less than parts = {self.parts}"
      )
    if not 0 <= self.noise < math.inf:
      raise UserError(f"noise = {self.noise} is refused: it must be 0 or greater and finite")
    if not 0 <= self.reinit <= 1:
      raise UserError(f"reinit = {self.reinit} is refused: it must be from 0 to 1")
    # With all columns 0 every token would ask for the first K experts, and only they would learn.
    if not 0 < self.router_std < math.inf:
      raise UserError(
        f"router_std = {self.router_std} is refused: it must be greater than 0 and finite; 1e-4 is"
        " a router of zeros with noise that breaks the ties"
      )

  @property
  def routed_parts(self) -> int:
    """Returns how many parts the routed experts share among them."""
    return self.parts - self.shared_parts


def choose_layers(config: ModelConfig, choice: str) -> tuple[int, ...]:
  """Returns the numbers of the layers that are to get experts.

  Args:
    config: the dense model.
    choice: "all", "every_other" (1, 3, ... as in Switch), "last_half", or numbers from 0 such as
      "1,3,5".

  Raises:
    UserError: a word or a number that is none of these.
  """
  _check_dense(config)
  count = len(config.layers())
  words = {
    "all": range(count),
    "every_other": range(1, count, 2),
    "last_half": range(count // 2, count),
  }
  if choice in words:
    chosen = tuple(words[choice])
  else:
    try:
      chosen = tuple(sorted({int(text) for text in choice.split(",")}))
    except ValueError:
      raise UserError(
        f"layers = {choice!r} is refused: {did_you_mean(choice, words)} (or numbers such as 1,3,5)"
      ) from None
  if not chosen or not set(chosen) <= set(range(count)):
    raise UserError(
      f"layers = {choice!r} is refused: the model's layers are 0 to {count - 1}; expected some of"
      " them"
    )
  return chosen


def upcycled_config(
  config: ModelConfig, routing: RoutingConfig, layers: tuple[int, ...], options: UpcycleOptions
) -> ModelConfig:
  """Returns the config of a dense model with experts in some layers.

  A dropless router gets ragged dispatch, which needs no room for all tokens in every expert.

  Raises:
    UserError: a model that has experts or no dense network, or one whose hidden units cannot be cut
      into so many parts.
  """
  _check_dense(config)
  weight_total(routing)
  mlp = config.mlp
  if mlp.hidden_dim % options.parts:
    raise UserError(
      f"parts = {options.parts} is refused: it must divide the dense hidden_dim = {mlp.hidden_dim}"
    )
  width = mlp.hidden_dim // options.parts
  moe = MoEConfig(
    routing,
    width,
    gated=mlp.gated,
    activation=mlp.activation,
    expert_dropout=mlp.dropout,
    expert_bias=mlp.bias,
    clamp=mlp.clamp,
    dispatch=Dispatch.RAGGED if routing.overflow == Overflow.DROPLESS else Dispatch.GATHER,
    shared_hidden_dim=width * options.shared_parts,
  )
  words = block_words(config)
  for layer in layers:
    words[layer] = words[layer].replace(":dense", ":moe")
  dense_left = any(":dense" in word for word in words)
  return dataclasses.replace(
    config, segments=as_segments(words), mlp=mlp if dense_left else None, moe=moe
  )


def with_output_scale(config: ModelConfig, options: UpcycleOptions) -> ModelConfig:
  """Returns the target's config with the `weight_scale` that `scaling = router` asks for."""
  if options.scaling != Scaling.ROUTER:
    return config
  return config.with_routing(weight_scale=options.routed_parts / weight_total(config.moe.routing))


def upcycling(
  source: ModelConfig, target: ModelConfig, options: UpcycleOptions, key: jax.Array
) -> Operation:
  """Returns the operation that upcycles a model.

  Moments are copied and cut like the parameters; those of routers and re-initialised units are
  zero. An expert's gradient is smaller than the dense network's, about 1 / E of it, so the carried
  second moments are too large at first and early steps small.

  Args:
    source: the dense config.
    target: `upcycled_config`, its `moe` changed as may be, through `with_output_scale`.
    options: as given to both.
    key: of routers, noise and re-initialised units.

  Raises:
    UserError: configs that do not belong together, or experts that do not fit the parts.
  """
  _check_dense(source)
  _check_experts(target, options)
  factor = 1.0
  if options.scaling == Scaling.WEIGHTS:
    routing = target.moe.routing
    factor = options.routed_parts / weight_total(routing) / routing.weight_scale
  converted = sorted(set(layers_of(target, "moe")) & set(layers_of(source, "dense")))
  edits = {
    layer: DenseToExperts(
      target,
      parts=options.parts,
      shared_parts=options.shared_parts,
      noise=options.noise,
      reinit=options.reinit,
      in_groups=options.router == RouterStart.VIRTUAL_GROUPS,
      router_std=options.router_std,
      factor=factor,
      key=jax.random.fold_in(key, layer),
    )
    for layer in converted
  }
  return Operation(source, target, edits)


def approximations(target: ModelConfig, options: UpcycleOptions) -> list[str]:
  """Returns why the upcycled model is not the dense one to rounding; nothing if it is.

  Apart from capacity: the promise is about dropless evaluation.
  """
  routing, reasons = target.moe.routing, []
  if options.noise:
    reasons.append(f"noise = {options.noise} is added to the experts")
  if options.reinit:
    reasons.append(f"{100 * options.reinit:g} % of every expert's hidden units start anew")
  if not has_fixed_total(routing):
    reasons.append(
      f"the weights of weighting = {routing.weighting} with selection = {routing.selection} add up"
      " to another total for every token; the scale is exact where all logits are equal"
    )
  picks_groups = options.router == RouterStart.VIRTUAL_GROUPS and routing.selection == "top_k"
  if options.routed_parts > 1 and not picks_groups:
    reasons.append(f"router = {options.router} does not pick every part equally often")
  scale = options.routed_parts / weight_total(routing)
  if options.scaling == Scaling.NONE and not math.isclose(routing.weight_scale, scale):
    reasons.append(
      f"scaling = none leaves weight_scale = {routing.weight_scale:g}, and {scale:g} would keep the"
      " scale"
    )
  return reasons


def _check_dense(config: ModelConfig) -> None:
  if config.moe is not None:
    raise UserError(
      f"segments = {config.segments} has experts already: upcycling takes a model whose"
      " feed-forwards are all dense; moe-jax convert grow adds experts"
    )
  if config.mlp is None or not layers_of(config, "dense"):
    raise UserError(f"segments = {config.segments} has no dense feed-forward; upcycling needs one")


def _check_experts(target: ModelConfig, options: UpcycleOptions) -> None:
  """Refuses experts that do not fit the parts of the dense networks."""
  moe, routing = target.moe, target.moe.routing
  if moe.shared_hidden_dim and moe.shared_combine != SharedCombine.ADD:
    raise UserError(
      f"shared_combine = {moe.shared_combine} is refused: a shared expert that is a part of the"
      " dense network is added to the others; use shared_combine = add"
    )
  if routing.num_experts % options.routed_parts:
    raise UserError(
      f"num_experts = {routing.num_experts} is refused: it must be a multiple of"
      f" {options.routed_parts}, the routed parts, so that there are as many copies of each"
    )
  if options.router == RouterStart.NORMAL:
    return
  if routing.num_logits != routing.num_experts or routing.projection == Projection.NORMALIZED:
    raise UserError(
      f"router = {options.router} is refused with null experts, hierarchical gates or projection ="
      " normalized; use router = normal"
    )
  if routing.selector.chooser != Chooser.TOKEN or routing.top_k % options.routed_parts:
    raise UserError(
      f"top_k = {routing.top_k} with selection = {routing.selection} is refused: with router ="
      f" {options.router} tokens choose a multiple of {options.routed_parts} experts, one of every"
      " routed part"
    )
