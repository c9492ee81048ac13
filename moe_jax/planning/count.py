"""Exact parameter counts and FLOPs of a config, from the shapes of its parameters."""

import dataclasses
import math

import jax
from flax import nnx

from moe_jax.models import Decoder, ModelConfig


@dataclasses.dataclass(frozen=True)
class ParameterCount:
  """Parameters of a model.

  Attributes:
    total: all.
    active: all but the experts a token does not visit; embedding and head included.
    routed_experts: those of routed experts.
    matmul_active: active parameters that multiply activations (no embedding look-up, no norms).
  """

  total: int
  active: int
  routed_experts: int
  matmul_active: int


def count_parameters(config: ModelConfig) -> ParameterCount:
  """Counts the parameters of a config without allocating any."""
  model = nnx.eval_shape(lambda: Decoder(config, key=jax.random.key(0)))
  total = routed = looked_up = 0
  for _, param in nnx.to_flat_state(nnx.split(model)[1]):
    size, axes = math.prod(param.get_value().shape), param.get_metadata()["axes"]
    total += size
    routed += size if "expert" in axes else 0
    looked_up += size if axes[-1] == "norm" else 0
  if not config.tie_embeddings:
    looked_up += config.vocab_size * config.model_dim
  idle = 0
  if routed:
    routing = config.moe.routing
    idle = routed * (routing.num_experts - routing.top_k) // routing.num_experts
  active = total - idle
  return ParameterCount(total, active, routed, active - looked_up)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
  """Returns forward + backward FLOPs a token of a model that drops nothing.

  6 a matmul parameter (2 forward, 4 backward) and attention's two products with, on average, half
  of the sequence: 6 * L * H * K a layer. A window is not
  taken into account; norms, softmax and routing's sorting are left out.
  """
  attention = config.attention.num_heads * config.attention.head_dim * sequence_length
  return 6.0 * (count_parameters(config).matmul_active + len(config.layers()) * attention)
