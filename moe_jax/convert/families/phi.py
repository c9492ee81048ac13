"""Phi-3.5-MoE (arXiv 2404.14219); the gate is GRIN's (arXiv 2409.12136)."""

import dataclasses
from typing import Any

from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import CONFIG_FILE, HubConfig
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
from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.layers.norms import Norm
from moe_jax.layers.rope_scaling import RopeScalingKind
from moe_jax.models import ModelConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.presets import preset

_MSCALES = ("short_mscale", "long_mscale")


def _read_attention(hub: HubConfig) -> AttentionConfig:
  """Returns attention whose cosines and sines have factors of their own if they are scaled.

  Raises:
    UserError: a scaling other than LongRoPE, or without those factors.
  """
  biased = hub.get("attention_bias", False)
  attention = read_attention(
    hub, theta=1e6, window=hub.get("sliding_window", None), qkv_bias=biased, out_bias=biased
  )
  scaling = attention.rope_scaling
  if scaling is None:
    return attention
  if scaling.kind != RopeScalingKind.LONGROPE:
    raise UserError(
      f"{CONFIG_FILE} has the rope scaling {scaling.kind}, which is not supported: expected default"
      f" or {RopeScalingKind.LONGROPE}"
    )
  given = HubConfig(hub.rope_settings())
  scaling = dataclasses.replace(scaling, **{name: given.get(name) for name in _MSCALES})
  return dataclasses.replace(attention, rope_scaling=scaling)


def _read(hub: HubConfig) -> ModelConfig:
  # The gate has two experts whatever the file says.
  hub.only("num_experts_per_tok", 2)
  hub = hub.with_defaults(num_key_value_heads=8)
  blocks = ["attention:moe"] * hub.get("num_hidden_layers")
  routing = preset(
    "grin",
    num_experts=hub.get("num_local_experts", 16),
    top_k=2,
    sparsemixer_epsilon=hub.get("router_jitter_noise", 0.01),
    **pooled_balance(hub, blocks, 0.001),
  )
  return ModelConfig(
    **read_model(hub, epsilon=1e-5),
    norm=Norm.LAYERNORM,
    head_bias=bool(hub.get("lm_head_bias", False)),
    segments=as_segments(blocks),
    attention=_read_attention(hub),
    moe=MoEConfig(routing, **read_network(hub, hub.get("intermediate_size"))),
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  moe, attention = config.moe, config.attention
  settings = write_attention(attention)
  if attention.rope_scaling is not None:
    scales = {name: getattr(attention.rope_scaling, name) for name in _MSCALES}
    settings["rope_scaling"] = settings["rope_scaling"] | scales
  return {
    **write_model(config),
    **settings,
    "sliding_window": attention.window,
    "attention_bias": attention.qkv_bias,
    "lm_head_bias": config.head_bias,
    "intermediate_size": moe.hidden_dim,
    "num_local_experts": moe.routing.num_experts,
    "num_experts_per_tok": moe.routing.top_k,
    "router_jitter_noise": moe.routing.sparsemixer_epsilon,
    "router_aux_loss_coef": write_balance_weight(config),
  }


PHIMOE = Family(
  architecture="PhimoeForCausalLM",
  model_type="phimoe",
  mixers=("attention",),
  read=_read,
  write=_write,
  rules=(
    *LLAMA_PARTS,
    router("block_sparse_moe.gate.weight"),
    *experts("block_sparse_moe.experts", ("w1", "w3", "w2")),
  ),
)
