"""Exact parameter counts and FLOPs of a config, from the shapes of its parameters."""

import dataclasses
import fractions
import math

import jax
from flax import nnx

from moe_jax.layers.parameters import is_elementwise
from moe_jax.models import Decoder, ModelConfig


@dataclasses.dataclass(frozen=True)
class ParameterCount:
  """Parameters of a model.

  Attributes:
    total: all.
    active: all but the experts a token does not visit; embedding and head included. A block that
      only some tokens take counts by the fraction of them, rounded to whole parameters.
    routed_experts: those of routed experts.
    matmul_active: active parameters that multiply activations (no embedding look-up, no norms, no
      biases).
  """

  total: int
  active: int
  routed_experts: int
  matmul_active: int


def count_parameters(config: ModelConfig) -> ParameterCount:
  """Counts the parameters of a config without allocating any."""
  model = nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0)))
  total = routed = 0
  active = multiplied = fractions.Fraction(0)
  # Router state is no parameter: no gradient reaches it.
  for path, param in nnx.to_flat_state(nnx.split(model, nnx.Param, ...)[1]):
    size, axes = math.prod(param.get_value().shape), param.get_metadata()["axes"]
    visits = _visits(config, path, axes)
    total += size
    routed += size if "expert" in axes else 0
    active += size * visits
    multiplied += 0 if is_elementwise(axes) else size * visits
  if not config.tie_embeddings:
    multiplied -= config.vocab_size * config.model_dim
  return ParameterCount(total, round(active), routed, round(multiplied))


def _visits(config: ModelConfig, path: tuple, axes: tuple[str, ...]) -> fractions.Fraction:
  """Returns the fraction of tokens that a parameter works on."""
  part = fractions.Fraction(1)
  # `DepthBlock` keeps what only some tokens take in `block`, its router beside it.
  if "block" in path:
    part *= fractions.Fraction(str(config.depth.capacity))
  if "expert" in axes:
    part *= fractions.Fraction(config.moe.routing.top_k, config.moe.routing.num_experts)
  return part


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
  """Returns forward + backward FLOPs a token of a model that drops nothing.

  6 a matmul parameter (2 forward, 4 backward) and attention's two products with, on average, half
  of the sequence: 6 * L * H * K a layer; a block that a fraction of the tokens takes needs that
  fraction squared. A window is not taken into account; norms, softmax and routing's sorting are
  left out.
  """
  attention = config.attention.num_heads * config.attention.head_dim * sequence_length
  depth = len(config.depth_layers())
  layers = len(config.layers()) - depth
  if depth:
    layers += depth * config.depth.capacity**2
  return 6.0 * (count_parameters(config).matmul_active + layers * attention)
