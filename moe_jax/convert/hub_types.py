"""What the settings of the hub must be: a file that says otherwise is refused by name.

A setting that no table here names is not checked.
"""

import json
import math
from collections.abc import Callable
from typing import Any

from moe_jax.errors import UserError

_LARGEST = 2**31 - 1
# Of layers and experts, which are listed one by one.
_MOST_LISTED = 10_000


def _is_integer(value: Any, least: int = 0) -> bool:
  return type(value) is int and least <= value <= _LARGEST


def _is_size(value: Any) -> bool:
  return _is_integer(value, 1)


def _is_count(value: Any) -> bool:
  return _is_integer(value, 1) and value <= _MOST_LISTED


def _is_short(value: Any) -> bool:
  return _is_integer(value) and value <= _MOST_LISTED


def _is_rank(value: Any) -> bool:
  return value == "auto" or _is_size(value)


def _is_number(value: Any) -> bool:
  # Python's integers may be too large for a float.
  return type(value) in (int, float) and abs(value) <= 1e300 and math.isfinite(value)


def _is_switch(value: Any) -> bool:
  return isinstance(value, bool)


def _is_word(value: Any) -> bool:
  return isinstance(value, str)


def _is_words(value: Any) -> bool:
  return isinstance(value, list) and all(map(_is_word, value))


def _is_integers(value: Any) -> bool:
  return isinstance(value, list) and all(map(_is_integer, value))


def _is_numbers(value: Any) -> bool:
  return isinstance(value, list) and all(map(_is_number, value))


def _is_section(value: Any) -> bool:
  return isinstance(value, dict)


# Test, how a sentence calls it, names.
_KINDS: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
  (
    _is_size,
    f"an integer from 1 to {_LARGEST}",
    """
    vocab_size hidden_size d_model num_attention_heads n_heads num_key_value_heads kv_n_heads
    head_dim num_experts_per_tok num_experts_per_token moe_top_k kv_lora_rank qk_nope_head_dim
    qk_rope_head_dim v_head_dim decoder_sparse_step interleave_moe_layer_step moe_layer_freq
    no_rope_layer_interval num_heads d_kv d_ff encoder_attention_heads decoder_attention_heads
    encoder_ffn_dim decoder_ffn_dim relative_attention_num_buckets
    relative_attention_max_distance num_channels projector_input_dim projector_output_dim
    vision_output_dim max_position_embeddings attn_layer_period expert_layer_period mamba_d_conv
    mamba_d_state mamba_expand
    """,
  ),
  (
    # Files have a zero where the rest of them says that it is not used.
    _is_integer,
    f"an integer from 0 to {_LARGEST}",
    """
    first_k_dense_replace n_shared_experts max_window_layers num_sparse_encoder_layers
    num_sparse_decoder_layers
    original_max_position_embeddings intermediate_size intermediate_size_mlp moe_intermediate_size
    shared_expert_intermediate_size ffn_hidden_size n_group topk_group q_lora_rank sliding_window
    attention_chunk_size encoder_sparse_step expert_capacity attn_layer_offset expert_layer_offset
    image_token_index image_token_id
    decoder_start_token_id pad_token_id
    """,
  ),
  (
    _is_count,
    f"an integer from 1 to {_MOST_LISTED}",
    """
    num_hidden_layers n_layers num_layers num_decoder_layers encoder_layers decoder_layers
    num_local_experts num_experts n_routed_experts moe_num_experts
    """,
  ),
  (_is_short, f"an integer from 0 to {_MOST_LISTED}", "num_nextn_predict_layers num_mtp_layers"),
  (_is_rank, f'"auto" or an integer from 1 to {_LARGEST}', "mamba_dt_rank"),
  (
    _is_number,
    "a finite number",
    """
    rope_theta partial_rotary_factor factor beta_fast beta_slow mscale mscale_all_dim
    attention_factor low_freq_factor high_freq_factor rms_norm_eps router_aux_loss_coef
    moe_loss_weight aux_loss_alpha routed_scaling_factor clip_qkv moe_normalize_expert_weights
    attention_multiplier embedding_multiplier logits_scaling residual_multiplier floor_scale
    norm_eps pixel_shuffle_ratio
    attn_scale swiglu_limit swiglu_alpha router_jitter_noise
    router_z_loss_coef short_mscale long_mscale dropout dropout_rate layer_norm_epsilon
    moe_token_dropout
    moe_eval_capacity_token_fraction
    """,
  ),
  (
    _is_switch,
    "true or false",
    """
    attention_bias mlp_bias qkv_bias lm_head_bias tie_word_embeddings norm_topk_prob seq_aux
    use_qk_norm use_sliding_window rope_interleave truncate
    batch_prioritized_routing mamba_conv_bias mamba_proj_bias router_bias scale_embedding
    normalize_router_prob_before_dropping
    """,
  ),
  (
    _is_word,
    "a string",
    "model_type hidden_act rope_type type topk_method scoring_func quant_method",
  ),
  (_is_words, "a list of strings", "architectures layer_types"),
  (_is_numbers, "a list of finite numbers", "short_factor long_factor"),
  (
    _is_integers,
    f"a list of integers from 0 to {_LARGEST}",
    "mlp_only_layers moe_layers no_rope_layers",
  ),
  (
    _is_section,
    "an object",
    """
    text_config vision_config rope_parameters rope_scaling quantization_config attn_config
    ffn_config ffn_act_fn
    """,
  ),
)
_KIND_OF = {name: (test, words) for test, words, names in _KINDS for name in names.split()}


def check_setting(name: str, value: Any, file: str) -> None:
  """Raises UserError if the setting of this name cannot have this value.

  Args:
    name: as in the file.
    value: as read from JSON, not null.
    file: what the sentence calls the file.
  """
  test, expected = _KIND_OF.get(name, (None, ""))
  if test is not None and not test(value):
    text = json.dumps(value)
    shown = text if len(text) <= 60 else f"{text[:60]}..."
    raise UserError(f"{file} has {name} = {shown}; expected {expected}")
