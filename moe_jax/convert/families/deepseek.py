"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434) and DeepSeek-V3 (arXiv 2412.19437)."""

from typing import Any

from moe_jax.convert.family import Family, as_segments
from moe_jax.convert.hub_config import CONFIG_FILE, HubConfig, write_rope
from moe_jax.convert.parts import (
  BLOCK,
  DENSE,
  NORMS,
  OUTER,
  PREDICTION_LAYERS,
  SHARED_EXPERTS,
  dense,
  dense_until,
  experts,
  read_model,
  read_network,
  renormalized,
  router,
  shared_width,
  write_dense_until,
  write_model,
  write_renormalized,
  write_shared,
)
from moe_jax.convert.rules import rule
from moe_jax.convert.transforms import LINEAR, LINEAR_OUT, SAME, joined, then
from moe_jax.errors import UserError
from moe_jax.layers.attention_config import LatentAttentionConfig, RotaryLayout
from moe_jax.layers.rope_scaling import RopeScalingKind
from moe_jax.models import ModelConfig
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.presets import preset

_ATTENTION = BLOCK + "self_attn."
# Every head's key part stands before its value part.
_HEADS_JOINED = then(joined(SAME, axis=-1), LINEAR)

LATENT_ATTENTION = (
  rule(_ATTENTION + "q_proj.weight", "mixer.query", LINEAR),
  rule(_ATTENTION + "q_a_proj.weight", "mixer.query_down", LINEAR),
  rule(_ATTENTION + "q_a_layernorm.weight", "mixer.query_norm.scale", SAME),
  rule(_ATTENTION + "q_b_proj.weight", "mixer.query_up", LINEAR),
  rule(
    _ATTENTION + "kv_a_proj_with_mqa.weight", "mixer.latent_down mixer.rope_key", joined(LINEAR)
  ),
  rule(_ATTENTION + "kv_a_layernorm.weight", "mixer.latent_norm.scale", SAME),
  rule(_ATTENTION + "kv_b_proj.weight", "mixer.key_up mixer.value_up", _HEADS_JOINED),
  rule(_ATTENTION + "o_proj.weight", "mixer.out", LINEAR_OUT),
)
_RULES = (
  *OUTER,
  *NORMS,
  *LATENT_ATTENTION,
  *DENSE,
  router("mlp.gate.weight"),
  *experts("mlp.experts"),
  *SHARED_EXPERTS,
)
_MIXERS = ("latent_attention",)


def _read_attention(hub: HubConfig, layout: RotaryLayout) -> LatentAttentionConfig:
  theta, scaling = hub.rope()
  if scaling is not None and scaling.kind != RopeScalingKind.YARN:
    _refuse_mscale(hub, scaling.kind)
  return LatentAttentionConfig(
    num_heads=hub.get("num_attention_heads"),
    query_rank=hub.get("q_lora_rank", None),
    kv_rank=hub.get("kv_lora_rank"),
    nope_dim=hub.get("qk_nope_head_dim"),
    rope_dim=hub.get("qk_rope_head_dim"),
    value_dim=hub.get("v_head_dim"),
    rope_theta=theta,
    rope_scaling=scaling,
    rotary_layout=layout,
  )


def _refuse_mscale(hub: HubConfig, kind: RopeScalingKind) -> None:
  """Raises UserError for a factor of the softmax scale, which the code applies to every kind."""
  if given := hub.rope_settings().get("mscale_all_dim"):
    raise UserError(
      f"{CONFIG_FILE} has mscale_all_dim = {given} with the rope scaling {kind}, which is not"
      f" supported: expected {RopeScalingKind.YARN}, or no mscale_all_dim"
    )


def _write_attention(c: LatentAttentionConfig) -> dict[str, Any]:
  return {
    "num_attention_heads": c.num_heads,
    "num_key_value_heads": c.num_heads,
    "q_lora_rank": c.query_rank,
    "kv_lora_rank": c.kv_rank,
    "qk_nope_head_dim": c.nope_dim,
    "qk_rope_head_dim": c.rope_dim,
    "v_head_dim": c.value_dim,
    **write_rope(c.rope_theta, c.rope_scaling),
  }


def _read(hub: HubConfig, routing: dict[str, Any], preset_name: str, layout) -> ModelConfig:
  hub.only("attention_bias", False)
  hub.only("moe_layer_freq", 1)
  blocks = dense_until(hub, "latent_attention")
  fields = dict(
    num_experts=hub.get("n_routed_experts"),
    top_k=hub.get("num_experts_per_tok"),
    weight_scale=float(hub.get("routed_scaling_factor", 1.0)),
    **routing,
  )
  return ModelConfig(
    **read_model(hub),
    segments=as_segments(blocks),
    latent_attention=_read_attention(hub, layout),
    mlp=dense(hub, blocks, hub.get("intermediate_size")),
    moe=MoEConfig(
      preset(preset_name, **fields),
      **read_network(hub, hub.get("moe_intermediate_size")),
      shared_hidden_dim=shared_width(hub),
    ),
  )


def _write(config: ModelConfig) -> dict[str, Any]:
  routing = config.moe.routing
  return {
    **write_model(config),
    **_write_attention(config.latent_attention),
    **write_dense_until(config),
    **write_shared(config),
    **write_renormalized(config),
    "n_routed_experts": routing.num_experts,
    "num_experts_per_tok": routing.top_k,
    "routed_scaling_factor": routing.weight_scale,
    "n_group": routing.num_expert_groups,
    "topk_group": routing.top_expert_groups,
    "aux_loss_alpha": routing.balance_loss_weight,
    "moe_layer_freq": 1,
    "attention_bias": False,
  }


def _read_v2(hub: HubConfig) -> ModelConfig:
  hub = hub.with_defaults(q_lora_rank=1536, n_shared_experts=2)
  hub.only("scoring_func", "softmax")
  # Released code and library differ in what they do with renormalised weights; no release has them.
  hub.only("norm_topk_prob", False)
  hub.only("mlp_bias", False)
  hub.only("topk_method", "greedy", "group_limited_greedy")
  # One group is no limit.
  limited = hub.get("topk_method", "greedy") != "greedy" and hub.get("n_group") > 1
  groups = dict(
    num_expert_groups=hub.get("n_group") if limited else 1,
    top_expert_groups=hub.get("topk_group") if limited else 1,
    balance_loss_weight=hub.get("aux_loss_alpha", 0.003),
    **({} if limited else {"device_loss_weight": 0.0, "communication_loss_weight": 0.0}),
  )
  return _read(hub, groups, "deepseek_v2", RotaryLayout.PAIRS)


def _write_v2(config: ModelConfig) -> dict[str, Any]:
  limited = config.moe.routing.num_expert_groups > 1
  method = "group_limited_greedy" if limited else "greedy"
  return {**_write(config), "topk_method": method, "scoring_func": "softmax"}


DEEPSEEK_V2 = Family(
  architecture="DeepseekV2ForCausalLM",
  model_type="deepseek_v2",
  mixers=_MIXERS,
  read=_read_v2,
  write=_write_v2,
  rules=_RULES,
)


def read_grouped_sigmoid(hub: HubConfig) -> dict[str, Any]:
  """Returns the routing fields of V3's gate, which GLM-4.5 shares."""
  hub.only("scoring_func", "sigmoid")
  hub.only("topk_method", "noaux_tc")
  return dict(
    num_expert_groups=hub.get("n_group", 1),
    top_expert_groups=hub.get("topk_group", 1),
    weighting=renormalized(hub, True),
    balance_loss_weight=hub.get("aux_loss_alpha", 0.0001),
  )


_V3_DEFAULTS = dict(
  q_lora_rank=1536,
  n_shared_experts=1,
  first_k_dense_replace=3,
  num_experts_per_tok=8,
  n_group=8,
  topk_group=4,
  routed_scaling_factor=2.5,
)
# The selection bias is a buffer there and a `RouterState` here: no gradient reaches it.
SELECTION_BIAS = rule(BLOCK + "mlp.gate.e_score_correction_bias", "feed_forward.router.bias", SAME)


def _read_v3(hub: HubConfig) -> ModelConfig:
  hub = hub.with_defaults(**_V3_DEFAULTS)
  layout = RotaryLayout.PAIRS if hub.get("rope_interleave", True) else RotaryLayout.HALVES
  return _read(hub, read_grouped_sigmoid(hub), "deepseek_v3", layout)


def _write_v3(config: ModelConfig) -> dict[str, Any]:
  return {
    **_write(config),
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_interleave": config.latent_attention.rotary_layout == RotaryLayout.PAIRS,
    "num_nextn_predict_layers": 0,
  }


DEEPSEEK_V3 = Family(
  architecture="DeepseekV3ForCausalLM",
  model_type="deepseek_v3",
  mixers=_MIXERS,
  read=_read_v3,
  write=_write_v3,
  rules=(*_RULES, SELECTION_BIAS),
  ignored=(PREDICTION_LAYERS,),
)
