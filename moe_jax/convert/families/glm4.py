"""GLM-4.5 and GLM-4.5-Air (arXiv 2508.06471); the gate is DeepSeek-V3's."""

from typing import Any

from moe_jax.convert.families.deepseek import SELECTION_BIAS, read_grouped_sigmoid
from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import HubConfig
from moe_jax.convert.parts import (
  DENSE,
  LLAMA_PARTS,
  PREDICTION_LAYERS,
  SHARED_EXPERTS,
  dense,
  dense_until,
  experts,
  head_width,
  read_attention,
  read_model,
  read_network,
  router,
  shared_width,
  write_attention,
  write_dense_until,
  write_model,
  write_renormalized,
  write_shared,
)
from moe_jax.layers.attention_config import QKNorm
from moe_jax.models import ModelConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.presets import preset

# Released files leave it out: half of a head is rotated.
_ROTATED_PART = 0.5


def _read(hub: HubConfig) -> ModelConfig:
  hub = hub.with_defaults(num_key_value_heads=8, n_shared_experts=1, first_k_dense_replace=1)
  model, blocks = read_model(hub, epsilon=1e-5), dense_until(hub, "attention")
  part = hub.rotated_part(_ROTATED_PART)
  routing = preset(
    "deepseek_v3",
    num_experts=hub.get("n_routed_experts"),
    top_k=hub.get("num_experts_per_tok", 8),
    weight_scale=float(hub.get("routed_scaling_factor", 1.0)),
    **read_grouped_sigmoid(hub),
  )
  return ModelConfig(
    **model,
    segments=as_segments(blocks),
    attention=read_attention(
      hub,
      rotary_dim=None if part == 1.0 else int(head_width(hub) * part),
      qk_norm=QKNorm.HEAD if hub.get("use_qk_norm", False) else QKNorm.NONE,
      qk_norm_epsilon=model["norm_epsilon"],
      qkv_bias=hub.get("attention_bias", False),
    ),
    mlp=dense(hub, blocks, hub.get("intermediate_size")),
    moe=MoEConfig(
      routing,
      **read_network(hub, hub.get("moe_intermediate_size")),
      shared_hidden_dim=shared_width(hub),
    ),
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  routing, attention = config.moe.routing, config.attention
  return {
    **write_model(config),
    "partial_rotary_factor": 1.0,
    **write_attention(attention),
    **write_dense_until(config),
    **write_shared(config),
    **write_renormalized(config),
    "attention_bias": attention.qkv_bias,
    "use_qk_norm": attention.qk_norm == QKNorm.HEAD,
    "n_routed_experts": routing.num_experts,
    "num_experts_per_tok": routing.top_k,
    "routed_scaling_factor": routing.weight_scale,
    "n_group": routing.num_expert_groups,
    "topk_group": routing.top_expert_groups,
    "num_nextn_predict_layers": 0,
  }


GLM4_MOE = Family(
  architecture="Glm4MoeForCausalLM",
  model_type="glm4_moe",
  mixers=("attention",),
  read=_read,
  write=_write,
  rules=(
    *LLAMA_PARTS,
    *DENSE,
    router("mlp.gate.weight"),
    SELECTION_BIAS,
    *experts("mlp.experts"),
    *SHARED_EXPERTS,
  ),
  ignored=(PREDICTION_LAYERS,),
)
