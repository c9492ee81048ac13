"""DBRX (Databricks; released code)."""

from typing import Any

from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import HubConfig, write_activation, write_rope
from moe_jax.convert.parts import pooled_balance, write_balance_weight
from moe_jax.convert.rules import rule
from moe_jax.convert.transforms import (
  FLAT_EXPERTS,
  LINEAR,
  LINEAR_OUT,
  SAME,
  TRANSPOSED,
  joined,
  then,
)
from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.layers.norms import Norm
from moe_jax.models import ModelConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.options import Weighting
from moe_jax.moe.presets import preset

# PyTorch's LayerNorm, which the code leaves as it is.
_EPSILON = 1e-5
_ORDER = "moe_normalize_expert_weights"


def _attention(hub: HubConfig) -> AttentionConfig:
  section, heads = hub.section("attn_config"), hub.get("num_attention_heads")
  # Released files have theta here alone, where recent releases of the library overlook it.
  theta, scaling = hub.rope(section.get("rope_theta", 10_000.0))
  return AttentionConfig(
    num_heads=heads,
    num_kv_heads=section.get("num_key_value_heads", 1),
    head_dim=hub.get("hidden_size") // heads,
    rope_theta=theta,
    rope_scaling=scaling,
    qkv_clip=section.get("clip_qkv", None),
  )


def _read(hub: HubConfig) -> ModelConfig:
  section = hub.section("ffn_config")
  activation = HubConfig(section.get("ffn_act_fn", {"name": "silu"})).activation("name")
  blocks = ["attention:moe"] * hub.get("num_hidden_layers")
  # Null is a choice here: weights are left as they are.
  order = section.get(_ORDER, None if _ORDER in section.values else 1.0)
  routing = preset(
    "mixtral",
    num_experts=section.get("moe_num_experts"),
    top_k=section.get("moe_top_k"),
    weighting=Weighting.RAW if order is None else Weighting.RENORMALIZED,
    weight_norm_order=float(order or 1.0),
    **pooled_balance(section, blocks, 0.01),
  )
  width = section.get("ffn_hidden_size")
  return ModelConfig(
    vocab_size=hub.get("vocab_size"),
    model_dim=hub.get("hidden_size"),
    tie_embeddings=bool(hub.get("tie_word_embeddings", False)),
    norm=Norm.LAYERNORM_NO_BIAS,
    norm_epsilon=_EPSILON,
    segments=as_segments(blocks),
    attention=_attention(hub),
    moe=MoEConfig(routing, hidden_dim=width, gated=True, activation=activation),
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  moe, attention, routing = config.moe, config.attention, config.moe.routing
  raw = routing.weighting == Weighting.RAW
  return {
    "vocab_size": config.vocab_size,
    "d_model": config.model_dim,
    "n_layers": len(config.layers()),
    "n_heads": attention.num_heads,
    "tie_word_embeddings": config.tie_embeddings,
    **write_rope(attention.rope_theta, attention.rope_scaling),
    "attn_config": {
      "kv_n_heads": attention.num_kv_heads,
      "clip_qkv": attention.qkv_clip,
      "rope_theta": attention.rope_theta,
    },
    "ffn_config": {
      "hidden_size": config.model_dim,
      "ffn_hidden_size": moe.hidden_dim,
      "ffn_act_fn": {"name": write_activation(moe.activation)},
      "moe_num_experts": routing.num_experts,
      "moe_top_k": routing.top_k,
      _ORDER: None if raw else routing.weight_norm_order,
      "moe_loss_weight": write_balance_weight(config),
    },
  }


_BLOCK = "transformer.blocks.{layer}."
_NORMS, _MLP = _BLOCK + "norm_attn_norm.", _BLOCK + "ffn.experts.mlp."
_OURS = "feed_forward.experts.weights."

DBRX = Family(
  architecture="DbrxForCausalLM",
  model_type="dbrx",
  mixers=("attention",),
  read=_read,
  write=_write,
  rules=(
    rule("transformer.wte.weight", "embedding", SAME),
    rule("transformer.norm_f.weight", "final_norm.scale", SAME),
    rule("lm_head.weight", "head", LINEAR),
    rule(_NORMS + "norm_1.weight", "mixer_norm.scale", SAME),
    rule(_NORMS + "norm_2.weight", "feed_forward_norm.scale", SAME),
    rule(_NORMS + "attn.Wqkv.weight", "mixer.query mixer.key mixer.value", joined(LINEAR)),
    rule(_NORMS + "attn.out_proj.weight", "mixer.out", LINEAR_OUT),
    rule(_BLOCK + "ffn.router.layer.weight", "feed_forward.router.kernel", LINEAR),
    rule(_MLP + "w1", _OURS + "gate", then(TRANSPOSED, FLAT_EXPERTS)),
    rule(_MLP + "v1", _OURS + "up", then(TRANSPOSED, FLAT_EXPERTS)),
    rule(_MLP + "w2", _OURS + "down", FLAT_EXPERTS),
  ),
)
