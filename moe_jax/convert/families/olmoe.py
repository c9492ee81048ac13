"""OLMoE-1B-7B (arXiv 2409.02060)."""

from typing import Any

from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import HubConfig
from moe_jax.convert.parts import (
  LLAMA_PARTS,
  experts,
  pooled_balance,
  read_attention,
  read_model,
  read_network,
  renormalized,
  router,
  write_attention,
  write_balance_weight,
  write_model,
  write_renormalized,
)
from moe_jax.layers.attention_config import QKNorm
from moe_jax.models import ModelConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.presets import preset


def _read(hub: HubConfig) -> ModelConfig:
  model = read_model(hub, epsilon=1e-5)
  blocks = ["attention:moe"] * hub.get("num_hidden_layers")
  biased = hub.get("attention_bias", False)
  routing = preset(
    "olmoe",
    num_experts=hub.get("num_experts"),
    top_k=hub.get("num_experts_per_tok", 8),
    weighting=renormalized(hub, False),
    **pooled_balance(hub, blocks, 0.01),
  )
  return ModelConfig(
    **model,
    segments=as_segments(blocks),
    attention=read_attention(
      hub,
      qk_norm=QKNorm.PROJECTION,
      qk_norm_epsilon=model["norm_epsilon"],
      qkv_clip=hub.get("clip_qkv", None),
      qkv_bias=biased,
      out_bias=biased,
    ),
    moe=MoEConfig(routing, **read_network(hub, hub.get("intermediate_size"))),
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  moe = config.moe
  return {
    **write_model(config),
    **write_attention(config.attention),
    **write_renormalized(config),
    "clip_qkv": config.attention.qkv_clip,
    "attention_bias": config.attention.qkv_bias,
    "intermediate_size": moe.hidden_dim,
    "num_experts": moe.routing.num_experts,
    "num_experts_per_tok": moe.routing.top_k,
    "router_aux_loss_coef": write_balance_weight(config),
  }


OLMOE = Family(
  architecture="OlmoeForCausalLM",
  model_type="olmoe",
  mixers=("attention",),
  read=_read,
  write=_write,
  rules=(*LLAMA_PARTS, router("mlp.gate.weight"), *experts("mlp.experts")),
)
