"""Granite 3 MoE (IBM; released code)."""

from typing import Any

from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import HubConfig
from moe_jax.convert.parts import (
  BLOCK,
  LLAMA_PARTS,
  pooled_balance,
  read_attention,
  read_model,
  read_network,
  router,
  write_attention,
  write_balance_weight,
  write_model,
)
from moe_jax.convert.rules import rule
from moe_jax.convert.transforms import TRANSPOSED, joined
from moe_jax.models import ModelConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.presets import preset


def _read(hub: HubConfig) -> ModelConfig:
  blocks = ["attention:moe"] * hub.get("num_hidden_layers")
  biased = hub.get("attention_bias", False)
  # The gate is Mixtral's.
  routing = preset(
    "mixtral",
    num_experts=hub.get("num_local_experts", 8),
    top_k=hub.get("num_experts_per_tok", 2),
    **pooled_balance(hub, blocks, 0.001),
  )
  return ModelConfig(
    **read_model(hub),
    segments=as_segments(blocks),
    attention=read_attention(
      hub,
      softmax_scale=float(hub.get("attention_multiplier", 1.0)),
      qkv_bias=biased,
      out_bias=biased,
    ),
    moe=MoEConfig(routing, **read_network(hub, hub.get("intermediate_size"))),
    embedding_multiplier=float(hub.get("embedding_multiplier", 1.0)),
    residual_multiplier=float(hub.get("residual_multiplier", 1.0)),
    logits_divisor=float(hub.get("logits_scaling", 1.0)),
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  moe, attention = config.moe, config.attention
  return {
    **write_model(config),
    **write_attention(attention),
    "attention_bias": attention.qkv_bias,
    "attention_multiplier": attention.scale,
    "embedding_multiplier": config.embedding_multiplier,
    "residual_multiplier": config.residual_multiplier,
    "logits_scaling": config.logits_divisor,
    "intermediate_size": moe.hidden_dim,
    "num_local_experts": moe.routing.num_experts,
    "num_experts_per_tok": moe.routing.top_k,
    "router_aux_loss_coef": write_balance_weight(config),
  }


_EXPERTS, _OURS = BLOCK + "block_sparse_moe.", "feed_forward.experts.weights."

GRANITE = Family(
  architecture="GraniteMoeForCausalLM",
  model_type="granitemoe",
  mixers=("attention",),
  read=_read,
  write=_write,
  rules=(
    *LLAMA_PARTS,
    router("block_sparse_moe.router.layer.weight"),
    rule(_EXPERTS + "input_linear.weight", f"{_OURS}gate {_OURS}up", joined(TRANSPOSED, axis=1)),
    rule(_EXPERTS + "output_linear.weight", f"{_OURS}down", TRANSPOSED),
  ),
)
