"""Tiny models of every decoder family, one or more that differ in a quirk; needs transformers."""

from collections.abc import Callable

import transformers
from deepseek_moe import DeepseekForCausalLM

_SPECIAL = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False)
_COMMON = dict(vocab_size=128, hidden_size=32, num_attention_heads=4, **_SPECIAL)


def _rope(theta, **scaling):
  return dict(rope_parameters={"rope_type": "default", "rope_theta": theta, **scaling})


def _yarn(mscale):
  # A context of 64 spreads the frequencies of so small a head over both sides of the ramp.
  return _rope(
    10_000.0,
    rope_type="yarn",
    factor=40.0,
    beta_fast=32,
    beta_slow=1,
    mscale=mscale,
    mscale_all_dim=mscale,
    original_max_position_embeddings=64,
  )


def _mixtral(**changes):
  settings = dict(
    intermediate_size=56,
    num_hidden_layers=3,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=256,
    sliding_window=None,
    **_rope(1e6),
  )
  return transformers.MixtralConfig(**{**_COMMON, **settings, **changes})


def _olmoe(**changes):
  settings = dict(
    intermediate_size=24,
    num_hidden_layers=3,
    num_key_value_heads=4,
    num_experts=16,
    num_experts_per_tok=4,
    norm_topk_prob=False,
    clip_qkv=None,
    max_position_embeddings=256,
    **_rope(10_000.0),
  )
  return transformers.OlmoeConfig(**{**_COMMON, **settings, **changes})


def _qwen(kind, **changes):
  settings = dict(
    intermediate_size=64,
    moe_intermediate_size=20,
    num_hidden_layers=3,
    num_key_value_heads=2,
    num_experts=8,
    num_experts_per_tok=3,
    max_position_embeddings=256,
    **_rope(1e6),
  )
  return kind(**{**_COMMON, **settings, **changes})


def _qwen2(**changes):
  fields = dict(shared_expert_intermediate_size=40, norm_topk_prob=False)
  return _qwen(transformers.Qwen2MoeConfig, **{**fields, **changes})


def _qwen3(**changes):
  fields = dict(head_dim=16, norm_topk_prob=True)
  return _qwen(transformers.Qwen3MoeConfig, **{**fields, **changes})


class DeepseekConfig(transformers.LlamaConfig):
  """The settings of DeepSeekMoE 16B."""

  model_type = "deepseek"


def _deepseek_v1(**changes):
  settings = dict(
    intermediate_size=80,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_key_value_heads=4,
    n_shared_experts=2,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_layer_freq=1,
    first_k_dense_replace=1,
    norm_topk_prob=False,
    scoring_func="softmax",
    aux_loss_alpha=0.001,
    seq_aux=True,
    max_position_embeddings=256,
    **_rope(10_000.0),
  )
  return DeepseekConfig(**{**_COMMON, **settings, **changes})


_LATENT = dict(
  intermediate_size=64,
  moe_intermediate_size=16,
  num_key_value_heads=4,
  n_routed_experts=16,
  num_experts_per_tok=4,
  kv_lora_rank=24,
  q_lora_rank=20,
  qk_nope_head_dim=16,
  qk_rope_head_dim=8,
  v_head_dim=12,
  max_position_embeddings=2560,
)


def _deepseek_v2(**changes):
  settings = dict(
    num_hidden_layers=3,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.0,
    topk_method="greedy",
    norm_topk_prob=False,
    **_yarn(0.707),
  )
  return transformers.DeepseekV2Config(**{**_COMMON, **_LATENT, **settings, **changes})


def _deepseek_v3(**changes):
  settings = dict(
    num_hidden_layers=4,
    n_shared_experts=1,
    first_k_dense_replace=2,
    routed_scaling_factor=2.5,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    rope_interleave=True,
    num_mtp_layers=0,
    **_yarn(1.0),
  )
  return transformers.DeepseekV3Config(**{**_COMMON, **_LATENT, **settings, **changes})


def _llama4(**changes):
  settings = dict(
    intermediate_size=40,
    intermediate_size_mlp=72,
    num_hidden_layers=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=4,
    num_experts_per_tok=1,
    interleave_moe_layer_step=1,
    use_qk_norm=True,
    no_rope_layer_interval=4,
    attention_chunk_size=8,
    attn_temperature_tuning=True,
    floor_scale=4,
    attn_scale=0.3,
    max_position_embeddings=1024,
    **_rope(
      500_000.0,
      rope_type="llama3",
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=64,
    ),
  )
  return transformers.Llama4TextConfig(**{**_COMMON, **settings, **changes})


def _gpt_oss(**changes):
  settings = dict(
    intermediate_size=32,
    num_hidden_layers=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=8,
    num_experts_per_tok=4,
    sliding_window=6,
    max_position_embeddings=8192,
    **_rope(
      150_000.0,
      rope_type="yarn",
      factor=32.0,
      beta_fast=32.0,
      beta_slow=1.0,
      truncate=False,
      original_max_position_embeddings=256,
    ),
  )
  return transformers.GptOssConfig(**{**_COMMON, **settings, **changes})


def _granite(**changes):
  settings = dict(
    intermediate_size=24,
    num_hidden_layers=3,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=3,
    embedding_multiplier=3.0,
    logits_scaling=2.0,
    residual_multiplier=0.4,
    attention_multiplier=0.2,
    max_position_embeddings=256,
    **_rope(10_000.0),
  )
  return transformers.GraniteMoeConfig(**{**_COMMON, **settings, **changes})


def _phimoe(**changes):
  settings = dict(
    intermediate_size=40,
    num_hidden_layers=3,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=2,
    router_jitter_noise=0.2,
    attention_bias=True,
    lm_head_bias=True,
    max_position_embeddings=256,
    **_rope(10_000.0),
  )
  return transformers.PhimoeConfig(**{**_COMMON, **settings, **changes})


def _dbrx(norm_order=1.0):
  experts = dict(
    hidden_size=32,
    ffn_hidden_size=48,
    moe_num_experts=8,
    moe_top_k=3,
    moe_normalize_expert_weights=norm_order,
  )
  return transformers.DbrxConfig(
    vocab_size=128,
    d_model=32,
    n_heads=4,
    n_layers=2,
    max_seq_len=256,
    attn_config=dict(clip_qkv=1.5, kv_n_heads=2, rope_theta=500_000.0),
    ffn_config=experts,
    **_rope(500_000.0),
    **_SPECIAL,
  )


def _jamba(**changes):
  settings = dict(
    intermediate_size=48,
    num_hidden_layers=6,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    expert_layer_period=2,
    expert_layer_offset=1,
    attn_layer_period=4,
    attn_layer_offset=2,
    mamba_d_state=8,
    mamba_dt_rank=6,
  )
  return transformers.JambaConfig(**{**_COMMON, **settings, **changes})


def _glm4(**changes):
  settings = dict(
    intermediate_size=64,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_key_value_heads=2,
    head_dim=16,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    first_k_dense_replace=1,
    norm_topk_prob=True,
    use_qk_norm=False,
    attention_bias=True,
    num_mtp_layers=0,
    max_position_embeddings=256,
    **_rope(1e6, partial_rotary_factor=0.5),
  )
  return transformers.Glm4MoeConfig(**{**_COMMON, **settings, **changes})


# What has a class of its own among the settings has one among the models; not DeepSeekMoE.
CONFIGS: dict[str, Callable] = {
  "mixtral_8x7b": _mixtral,
  "mixtral_8x22b": lambda: _mixtral(num_attention_heads=6, head_dim=12, num_hidden_layers=2),
  "mixtral_swa": lambda: _mixtral(sliding_window=6, num_hidden_layers=2),
  "olmoe": _olmoe,
  "olmoe_clip_gqa_norm": lambda: _olmoe(clip_qkv=1.0, num_key_value_heads=2, norm_topk_prob=True),
  "qwen2_moe": _qwen2,
  "qwen2_moe_mixed": lambda: _qwen2(
    num_hidden_layers=4,
    decoder_sparse_step=2,
    mlp_only_layers=[3],
    norm_topk_prob=True,
    num_key_value_heads=4,
    use_sliding_window=True,
    sliding_window=6,
    max_window_layers=3,
  ),
  "qwen3_moe": _qwen3,
  "qwen3_moe_mixed": lambda: _qwen3(num_hidden_layers=4, mlp_only_layers=[1], norm_topk_prob=False),
  "deepseek_v1": _deepseek_v1,
  "deepseek_v1_norm": lambda: _deepseek_v1(
    norm_topk_prob=True, seq_aux=False, num_key_value_heads=2
  ),
  "deepseek_v2_lite": lambda: _deepseek_v2(q_lora_rank=None),
  "deepseek_v2": lambda: _deepseek_v2(
    topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0
  ),
  "deepseek_v2_plain_rope": lambda: _deepseek_v2(**_rope(10_000.0)),
  "deepseek_v3": _deepseek_v3,
  "deepseek_v3_halves": lambda: _deepseek_v3(
    q_lora_rank=None,
    norm_topk_prob=False,
    n_shared_experts=2,
    rope_interleave=False,
    **_rope(10_000.0),
  ),
  "llama4_scout": _llama4,
  "llama4_maverick": lambda: _llama4(
    interleave_moe_layer_step=2, num_local_experts=8, use_qk_norm=False, **_rope(500_000.0)
  ),
  "llama4_top2": lambda: _llama4(
    num_experts_per_tok=2, no_rope_layer_interval=2, attn_temperature_tuning=False
  ),
  "gpt_oss": _gpt_oss,
  "gpt_oss_clamp": lambda: _gpt_oss(num_hidden_layers=2),
  "granitemoe": _granite,
  "granitemoe_tied": lambda: _granite(tie_word_embeddings=True),
  "phimoe": _phimoe,
  "phimoe_narrow": lambda: _phimoe(router_jitter_noise=0.01, num_hidden_layers=2),
  "phimoe_longrope": lambda: _phimoe(
    num_hidden_layers=1,
    **_rope(
      10_000.0,
      rope_type="longrope",
      short_factor=[1.0, 1.5, 2.0, 3.0],
      long_factor=[2.0, 4.0, 8.0, 16.0],
      short_mscale=1.2,
      long_mscale=1.5,
      original_max_position_embeddings=64,
    ),
  ),
  "dbrx": _dbrx,
  "dbrx_p2": lambda: _dbrx(norm_order=2.0),
  "jamba": _jamba,
  "jamba_projbias_tied": lambda: _jamba(
    mamba_proj_bias=True,
    mamba_conv_bias=False,
    mamba_dt_rank="auto",
    tie_word_embeddings=True,
    expert_layer_period=3,
    expert_layer_offset=0,
  ),
  "glm4_moe": _glm4,
  "glm4_moe_groups": lambda: _glm4(
    use_qk_norm=True, attention_bias=False, n_group=4, topk_group=2, routed_scaling_factor=2.5
  ),
}
# Factors of tensors whose keys contain a text: large gates reach the clamp, small tied embeddings
# leave logits of a usual size.
GAINS = {
  "gpt_oss_clamp": {"gate_up_proj": 4.0},
  "granitemoe_tied": {"embed": 0.3},
  "jamba_projbias_tied": {"embed": 0.2},
}


def model_class(config):
  """Returns the class of the model of a config."""
  if isinstance(config, DeepseekConfig):
    return DeepseekForCausalLM
  if config.is_encoder_decoder:
    return transformers.AutoModelForSeq2SeqLM._model_mapping[type(config)]
  images = isinstance(config, transformers.Llama4Config)
  auto = transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM
  return auto._model_mapping[type(config)]
