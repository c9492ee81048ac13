"""Qwen1.5-MoE and Qwen2-57B (arXiv 2407.10671), Qwen3-MoE (arXiv 2505.09388)."""

import dataclasses
from typing import Any

from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import HubConfig
from moe_jax.convert.parts import (
  DENSE,
  LLAMA_PARTS,
  PROJECTIONS,
  dense,
  experts,
  network,
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
from moe_jax.convert.rules import rule
from moe_jax.convert.transforms import LINEAR
from moe_jax.layers.attention_config import AttentionConfig, QKNorm
from moe_jax.models import ModelConfig
from moe_jax.moe.layer import MoEConfig, SharedCombine
from moe_jax.moe.presets import preset

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _feed_forwards(hub: HubConfig) -> list[str]:
  """Returns "moe" for every layer whose number, from 1, is a multiple of the step, or "dense"."""
  step, dense_layers = hub.get("decoder_sparse_step", 1), hub.get("mlp_only_layers", [])
  return [
    "moe" if (layer + 1) % step == 0 and layer not in dense_layers else "dense"
    for layer in range(hub.get("num_hidden_layers"))
  ]


def _layer_types(hub: HubConfig) -> list[str]:
  """Returns what every layer attends to.

  Without a list the library gives a window to every second of the first `max_window_layers`.
  """
  layers = range(hub.get("num_hidden_layers"))
  if not hub.get("use_sliding_window", False):
    return hub.layer_types((_FULL,), [_FULL for _ in layers])
  first = hub.get("max_window_layers", 28)
  default = [_SLIDING if i % 2 == 0 and i < first else _FULL for i in layers]
  return hub.layer_types((_FULL, _SLIDING), default)


def _attentions(kinds: list[str], whole: AttentionConfig, window: int | None) -> dict[str, Any]:
  """Returns the mixers that layers of these kinds have; a model of one kind has one mixer."""
  if _SLIDING not in kinds:
    return {"attention": whole}
  windowed = dataclasses.replace(whole, window=window)
  return {"attention": windowed} | ({"global_attention": whole} if _FULL in kinds else {})


def _word(kind: str, kinds: list[str]) -> str:
  return "global_attention" if kind == _FULL and _SLIDING in kinds else "attention"


def _write_layers(config: ModelConfig) -> dict[str, Any]:
  layers, attention = config.layers(), config.attention or config.global_attention
  return {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [i for i, block in enumerate(layers) if block[1] == "dense"],
    "intermediate_size": config.mlp.hidden_dim if config.mlp else config.moe.hidden_dim,
    "moe_intermediate_size": config.moe.hidden_dim,
    "use_sliding_window": attention.window is not None,
    "sliding_window": attention.window,
    "num_experts": config.moe.routing.num_experts,
    "num_experts_per_tok": config.moe.routing.top_k,
    "router_aux_loss_coef": write_balance_weight(config),
    **write_renormalized(config),
  }


def _read_qwen2(hub: HubConfig) -> ModelConfig:
  hub = hub.with_defaults(num_key_value_heads=16, sliding_window=4096)
  kinds = _layer_types(hub)
  blocks = [
    f"{_word(kind, kinds)}:{ff}" for kind, ff in zip(kinds, _feed_forwards(hub), strict=True)
  ]
  whole = read_attention(hub, qkv_bias=hub.get("qkv_bias", True))
  routing = preset(
    "qwen3_moe",
    num_experts=hub.get("num_experts", 60),
    top_k=hub.get("num_experts_per_tok", 4),
    weighting=renormalized(hub, False),
    **pooled_balance(hub, blocks, 0.001),
  )
  return ModelConfig(
    **read_model(hub),
    **_attentions(kinds, whole, hub.get("sliding_window", None)),
    segments=as_segments(blocks),
    mlp=dense(hub, blocks, hub.get("intermediate_size")),
    moe=MoEConfig(
      routing,
      **read_network(hub, hub.get("moe_intermediate_size")),
      shared_hidden_dim=hub.get("shared_expert_intermediate_size"),
      shared_combine=SharedCombine.GATED,
    ),
  )


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
  attention = config.attention or config.global_attention
  windowed = attention.window is not None
  words = [block[0] for block in config.layers()]
  return {
    **write_model(config),
    **write_attention(attention),
    **_write_layers(config),
    "qkv_bias": attention.qkv_bias,
    "shared_expert_intermediate_size": config.moe.shared_hidden_dim,
    "layer_types": [_SLIDING if windowed and word == "attention" else _FULL for word in words],
    "max_window_layers": len(words),
  }


QWEN2_MOE = Family(
  architecture="Qwen2MoeForCausalLM",
  model_type="qwen2_moe",
  mixers=("attention", "global_attention"),
  read=_read_qwen2,
  write=_write_qwen2,
  rules=(
    *LLAMA_PARTS,
    *DENSE,
    router("mlp.gate.weight"),
    *experts("mlp.experts"),
    *network("mlp.shared_expert", "feed_forward.shared.network.weights", PROJECTIONS),
    rule("model.layers.{layer}.mlp.shared_expert_gate.weight", "feed_forward.shared.gate", LINEAR),
  ),
)


def _read_qwen3(hub: HubConfig) -> ModelConfig:
  hub = hub.with_defaults(num_key_value_heads=4, sliding_window=4096)
  model = read_model(hub)
  blocks = [f"attention:{ff}" for ff in _feed_forwards(hub)]
  biased = hub.get("attention_bias", False)
  windowed = hub.get("use_sliding_window", False)
  routing = preset(
    "qwen3_moe",
    num_experts=hub.get("num_experts"),
    top_k=hub.get("num_experts_per_tok", 8),
    weighting=renormalized(hub, False),
    **pooled_balance(hub, blocks, 0.001),
  )
  return ModelConfig(
    **model,
    segments=as_segments(blocks),
    attention=read_attention(
      hub,
      qk_norm=QKNorm.HEAD,
      qk_norm_epsilon=model["norm_epsilon"],
      qkv_bias=biased,
      out_bias=biased,
      window=hub.get("sliding_window", None) if windowed else None,
    ),
    mlp=dense(hub, blocks, hub.get("intermediate_size")),
    moe=MoEConfig(routing, **read_network(hub, hub.get("moe_intermediate_size"))),
  )


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
  return {
    **write_model(config),
    **write_attention(config.attention),
    **_write_layers(config),
    "attention_bias": config.attention.qkv_bias,
  }


QWEN3_MOE = Family(
  architecture="Qwen3MoeForCausalLM",
  model_type="qwen3_moe",
  mixers=("attention",),
  read=_read_qwen3,
  write=_write_qwen3,
  rules=(*LLAMA_PARTS, *DENSE, router("mlp.gate.weight"), *experts("mlp.experts")),
)
