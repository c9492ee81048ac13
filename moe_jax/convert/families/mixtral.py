"""Mixtral 8x7B and 8x22B (arXiv 2401.04088)."""

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
  router,
  write_attention,
  write_balance_weight,
  write_model,
)
from moe_jax.models import ModelConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.presets import preset


def _read(hub: HubConfig) -> ModelConfig:
  hub = hub.with_defaults(num_key_value_heads=8)
  blocks = ["attention:moe"] * hub.get("num_hidden_layers")
  routing = preset(
    "mixtral",
    num_experts=hub.get("num_local_experts"),
    top_k=hub.get("num_experts_per_tok", 2),
    **pooled_balance(hub, blocks, 0.001),
  )
  return ModelConfig(
    **read_model(hub, epsilon=1e-5),
    segments=as_segments(blocks),
    attention=read_attention(hub, theta=1e6, window=hub.get("sliding_window", None)),
    moe=MoEConfig(routing, **read_network(hub, hub.get("intermediate_size"))),
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  moe = config.moe
  return {
    **write_model(config),
    **write_attention(config.attention),
    "sliding_window": config.attention.window,
    "intermediate_size": moe.hidden_dim,
    "num_local_experts": moe.routing.num_experts,
    "num_experts_per_tok": moe.routing.top_k,
    "router_aux_loss_coef": write_balance_weight(config),
  }


MIXTRAL = Family(
  architecture="MixtralForCausalLM",
  model_type="mixtral",
  mixers=("attention",),
  read=_read,
  write=_write,
  rules=(
    *LLAMA_PARTS,
    router("block_sparse_moe.gate.weight"),
    *experts("block_sparse_moe.experts", ("w1", "w3", "w2")),
  ),
)
