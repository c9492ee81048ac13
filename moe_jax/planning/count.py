"""Exact parameter counts, from the fields of a config alone: nothing is built or allocated."""

import dataclasses
import fractions
import functools

from moe_jax.models import ModelConfig
from moe_jax.models.config import DEPTH, NormPlacement
from moe_jax.moe.options import BiasUpdate
from moe_jax.planning.sizes import (
  Size,
  attention_size,
  feed_forward_size,
  mixer_size,
  norm_size,
  relative_bias_size,
  router_size,
  shared_experts_size,
)
from moe_jax.planning.vision import vision_parameters

COMPONENTS = (
  "embedding",
  "head",
  "attention",
  "mamba",
  "cross_attention",
  "dense_feed_forward",
  "router",
  "routed_experts",
  "shared_experts",
  "norms",
  "depth_router",
  "vision",
)

_WHOLE = fractions.Fraction(1)


@dataclasses.dataclass(frozen=True)
class Component:
  """Parameters of one part of a model, over all layers.

  Attributes:
    total: all.
    active: those that work on one token. A part that takes only some tokens counts by their
      fraction, so this may be no whole number.
    matmul_active: the active ones that multiply activations of text: none of a vision tower.
  """

  total: int = 0
  active: fractions.Fraction = fractions.Fraction(0)
  matmul_active: fractions.Fraction = fractions.Fraction(0)

  def plus(self, size: Size, share: fractions.Fraction) -> "Component":
    """Returns this part with more parameters, of which a token visits `share`."""
    number = size.matrices + size.rest
    return Component(
      self.total + number,
      self.active + number * share,
      self.matmul_active + size.matrices * share,
    )


@dataclasses.dataclass(frozen=True)
class ParameterCount:
  """Parameters of a model.

  Attributes:
    components: by name, those of `COMPONENTS` that the model has.
    multi_token: the modules of multi-token prediction, which only training uses; counted apart.
    selection_biases: the router's biases that choose experts (DeepSeek-V3), without those of
      `multi_token`. They are counted apart: a rule and no gradient moves them.
  """

  components: dict[str, Component]
  multi_token: Component
  selection_biases: int

  @property
  def total(self) -> int:
    """All parameters but those counted apart."""
    return sum(part.total for part in self.components.values())

  @property
  def active(self) -> int:
    """All but the experts a token does not visit; embedding, head, encoder and tower included."""
    return round(sum(part.active for part in self.components.values()))

  @property
  def active_without_input_embedding(self) -> int:
    """The same without the matrix that tokens are looked up in, tied to the head or not."""
    return self.active - self.components["embedding"].total

  @property
  def active_without_embeddings(self) -> int:
    """The same without embedding and head."""
    return self.active_without_input_embedding - self._total("head")

  @property
  def routed_experts(self) -> int:
    """Those of routed experts."""
    return self._total("routed_experts")

  @property
  def matmul_active(self) -> int:
    """Active parameters that multiply activations: no embedding look-up, norms, biases, tower."""
    return round(sum(part.matmul_active for part in self.components.values()))

  def _total(self, name: str) -> int:
    return self.components.get(name, Component()).total


# A search asks for the same few models a thousand times.
@functools.lru_cache(maxsize=64)
def count_parameters(config: ModelConfig) -> ParameterCount:
  """Counts the parameters of a config; the result is shared, so leave its parts as they are."""
  parts = dict.fromkeys(COMPONENTS, Component())
  for name, size, share in _outside_blocks(config):
    parts[name] = parts[name].plus(size, share)
  for stack in stacks(config):
    for name, size, share in _around_blocks(stack):
      parts[name] = parts[name].plus(size, share)
    for block in stack.layers():
      for name, size, share in _block(stack, block):
        parts[name] = parts[name].plus(size, share)
  biases = 0
  if config.moe is not None and config.moe.routing.bias_update != BiasUpdate.NONE:
    biases = len(config.moe_layers()) * config.moe.routing.num_logits
  parts = {name: part for name, part in parts.items() if part.total}
  return ParameterCount(parts, _multi_token(config), biases)


def stacks(config: ModelConfig) -> list[ModelConfig]:
  """Returns the config of the encoder, if there is one, and that of the decoder."""
  encoder = config.encoder_stack()
  return [config] if encoder is None else [encoder, config]


def _around_blocks(stack: ModelConfig):
  """Yields (component, size, share of tokens) of what a stack has besides its blocks."""
  if stack.norm_placement == NormPlacement.PRE:
    yield "norms", norm_size(stack, stack.model_dim), _WHOLE
  if stack.attention is not None and stack.attention.relative_bias_shared:
    yield "attention", Size(0, relative_bias_size(stack.attention)), _WHOLE


def _multi_token(config: ModelConfig) -> Component:
  """Returns the modules of multi-token prediction; embedding and head are the model's own."""
  D, part = config.model_dim, Component()
  for _ in range(config.mtp_depth):
    part = part.plus(Size(2 * D * D), _WHOLE)
    for _ in range(3):
      part = part.plus(norm_size(config, D), _WHOLE)
    for _, size, share in _block(config, config.layers()[-1][:2]):
      part = part.plus(size, share)
  return part


def _outside_blocks(config: ModelConfig):
  """Yields (component, size, share of tokens) of what is there once."""
  embedding = config.vocab_size * config.model_dim
  if config.tie_embeddings:
    # Looked up and, as the head, multiplied.
    yield "embedding", Size(embedding), _WHOLE
  else:
    yield "embedding", Size(0, embedding), _WHOLE
    yield "head", Size(embedding), _WHOLE
  if config.encoder is not None and config.encoder.own_embedding:
    yield "embedding", Size(0, embedding), _WHOLE
  # See `moe_jax.planning.vision` for what it multiplies.
  yield "vision", Size(0, vision_parameters(config)), _WHOLE
  yield "head", Size(0, config.vocab_size if config.head_bias else 0), _WHOLE


def _block(config: ModelConfig, block: tuple[str, ...]):
  """Yields (component, size, share of tokens) of a block."""
  D, (mixer, feed_forward) = config.model_dim, block[:2]
  share = _WHOLE
  if DEPTH in block:
    yield "depth_router", Size(D), share
    share = fractions.Fraction(str(config.depth.capacity))
  for _ in range(2):
    yield "norms", norm_size(config, D), share
  component = "mamba" if mixer == "mamba" else "attention"
  yield component, mixer_size(config, mixer), share
  if config.cross_attention is not None:
    yield "cross_attention", attention_size(D, config.cross_attention), share
    yield "norms", norm_size(config, D), share
  if feed_forward == "dense":
    yield "dense_feed_forward", feed_forward_size(D, config.mlp), share
    return
  E, expert = config.moe.routing.num_experts, feed_forward_size(D, config.moe.feed_forward())
  yield "router", router_size(D, config.moe), share
  visited = share * fractions.Fraction(config.moe.routing.top_k, E)
  yield "routed_experts", Size(E * expert.matrices, E * expert.rest), visited
  yield "shared_experts", shared_experts_size(D, config.moe), share
