"""The plan of a config: what the model costs, under stated conventions, as plain numbers."""

import dataclasses

from moe_jax.models import ModelConfig
from moe_jax.planning.count import count_parameters
from moe_jax.planning.flops import (
  DispatchCost,
  dispatch_cost,
  forward_flops,
  multi_token_flops_per_token,
  training_flops_per_token,
)
from moe_jax.planning.memory import (
  cache_bytes_per_sequence,
  cache_bytes_per_token,
  encoded_cache_bytes_per_token,
  optimizer_bytes,
  weight_bytes,
)
from moe_jax.planning.vision import vision_flops_per_image_token


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a model costs, whatever the devices. Names are those of `moe-jax plan --json`.

  Attributes:
    total_parameters: all; multi-token prediction and selection biases are apart.
    active_parameters: those that work on one token, embedding and head included.
    active_parameters_without_input_embedding: the same without the matrix that tokens are looked
      up in, tied to the head or not.
    active_parameters_without_embeddings: the same without embedding and head.
    multi_token_prediction_parameters: of the modules that predict further tokens in training.
    selection_biases: of all routers but theirs; a rule and no gradient moves them.
    components: `total_parameters` and `active_parameters` of each part.
    batch_size, sequence_length: of the call whose FLOPs these are.
    flops_per_token_forward: see `moe_jax.planning.flops`.
    flops_per_token_training: forward and backward, without multi-token prediction.
    multi_token_prediction_flops_per_token_training: what that adds.
    flops_per_token_forward_by_component: what the forward FLOPs are the sum of.
    vision_flops_per_image_token_forward: what the tower adds to a token that stands for an image,
      see `moe_jax.planning.vision`.
    dispatch_form: how tokens travel to experts; None without experts.
    dispatch_flops_per_token_forward, empty_slot_flops_per_token_forward: what that form adds, over
      all MoE layers, see `DispatchCost`.
    slots_per_token: rows that experts compute for a token in one layer.
    cache_bytes_per_token, encoded_cache_bytes_per_token, cache_bytes_per_sequence: of a token that
      is decoded, of one that an encoder read, and of a sequence whatever its length; see
      `moe_jax.planning.memory`, as for the other bytes.
    weight_bytes, gradient_bytes, optimizer_bytes: float32, as training keeps them.
  """

  total_parameters: int
  active_parameters: int
  active_parameters_without_input_embedding: int
  active_parameters_without_embeddings: int
  multi_token_prediction_parameters: int
  selection_biases: int
  components: dict[str, dict[str, int]]
  batch_size: int
  sequence_length: int
  flops_per_token_forward: float
  flops_per_token_training: float
  multi_token_prediction_flops_per_token_training: float
  flops_per_token_forward_by_component: dict[str, float]
  vision_flops_per_image_token_forward: float
  dispatch_form: str | None
  dispatch_flops_per_token_forward: float
  empty_slot_flops_per_token_forward: float
  slots_per_token: float
  cache_bytes_per_token: int
  encoded_cache_bytes_per_token: int
  cache_bytes_per_sequence: int
  weight_bytes: int
  gradient_bytes: int
  optimizer_bytes: int


def plan_model(config: ModelConfig, *, batch_size: int, sequence_length: int) -> Plan:
  """Returns what the model costs when called with a batch of that size."""
  count = count_parameters(config)
  flops = forward_flops(config, sequence_length)
  return Plan(
    total_parameters=count.total,
    active_parameters=count.active,
    active_parameters_without_input_embedding=count.active_without_input_embedding,
    active_parameters_without_embeddings=count.active_without_embeddings,
    multi_token_prediction_parameters=count.multi_token.total,
    selection_biases=count.selection_biases,
    components={
      name: {"total_parameters": part.total, "active_parameters": round(part.active)}
      for name, part in count.components.items()
    },
    batch_size=batch_size,
    sequence_length=sequence_length,
    flops_per_token_forward=sum(flops.values()),
    flops_per_token_training=training_flops_per_token(config, sequence_length),
    multi_token_prediction_flops_per_token_training=multi_token_flops_per_token(
      config, sequence_length
    ),
    flops_per_token_forward_by_component=flops,
    vision_flops_per_image_token_forward=vision_flops_per_image_token(config),
    **_dispatch(config, batch_size, sequence_length),
    cache_bytes_per_token=cache_bytes_per_token(config),
    encoded_cache_bytes_per_token=encoded_cache_bytes_per_token(config),
    cache_bytes_per_sequence=cache_bytes_per_sequence(config),
    weight_bytes=weight_bytes(config),
    gradient_bytes=optimizer_bytes(config) // 2,
    optimizer_bytes=optimizer_bytes(config),
  )


def _dispatch(config: ModelConfig, batch_size: int, sequence_length: int) -> dict:
  """Returns the fields of a plan that tell what dispatch costs."""
  form, layers, cost = None, 0, DispatchCost(0.0, 0.0, 0.0)
  if config.moe is not None:
    form, layers = config.moe.dispatch.value, len(config.moe_layers())
    cost = dispatch_cost(config.moe, config.model_dim, batch_size, sequence_length)
  return {
    "dispatch_form": form,
    "dispatch_flops_per_token_forward": layers * cost.flops,
    "empty_slot_flops_per_token_forward": layers * cost.empty_slot_flops,
    "slots_per_token": cost.slots_per_token,
  }
