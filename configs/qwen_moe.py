"""Qwen's mixtures of experts: Qwen1.5-MoE, Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388).

  configs/qwen_moe.py:tiny         the default, Qwen3's; a minute on a CPU, most of it to compile
  configs/qwen_moe.py:1_5_a2_7b    14.32 B total, 2.69 B active, 15.5 GFLOP
  configs/qwen_moe.py:2_57b_a14b   57.41 B total, 14.25 B active, 84.7 GFLOP
  configs/qwen_moe.py:3_30b_a3b    30.53 B total, 3.35 B active, 23.1 GFLOP
  configs/qwen_moe.py:3_235b_a22b  235.09 B total, 22.19 B active, 148 GFLOP

Sizes are those of the releases. The first two add a shared expert through a sigmoid gate, have
biases on queries, keys and values, and do not renormalise router weights; Qwen3 normalises queries
and keys of each head and renormalises the weights.

GFLOP: to train on a token of a sequence of 4,096. Memory and more:
`moe-jax plan --config=configs/qwen_moe.py:3_30b_a3b`.
"""

from ml_collections import config_dict

from moe_jax.config import to_mapping
from moe_jax.moe import preset
from moe_jax.training.template import (
  PUBLISHED_MODEL,
  PUBLISHED_RUN,
  TINY_RUN,
  choose_variant,
  full_config,
)

# Qwen2's router differs from Qwen3's in the weights, and no report tells the scope of its loss.
_QWEN2_ROUTER = dict(weighting="raw", balance_scope="batch")

VARIANTS = {
  "tiny": dict(
    attention=dict(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="head"),
    model=dict(model_dim=32, segments=(("attention:moe", 2),)),
    moe=dict(hidden_dim=32),
    router=dict(num_experts=8, top_k=2),
  ),
  "1_5_a2_7b": dict(
    attention=dict(num_heads=16, num_kv_heads=16, head_dim=128, qkv_bias=True),
    model=dict(model_dim=2048, segments=(("attention:moe", 24),)),
    moe=dict(hidden_dim=1408, shared_hidden_dim=5632, shared_combine="gated"),
    router=dict(num_experts=60, top_k=4, **_QWEN2_ROUTER),
  ),
  "2_57b_a14b": dict(
    attention=dict(num_heads=28, num_kv_heads=4, head_dim=128, qkv_bias=True),
    model=dict(model_dim=3584, segments=(("attention:moe", 28),)),
    moe=dict(hidden_dim=2560, shared_hidden_dim=20480, shared_combine="gated"),
    router=dict(num_experts=64, top_k=8, **_QWEN2_ROUTER),
  ),
  "3_30b_a3b": dict(
    attention=dict(num_heads=32, num_kv_heads=4, head_dim=128, qk_norm="head"),
    model=dict(model_dim=2048, segments=(("attention:moe", 48),)),
    moe=dict(hidden_dim=768),
    router=dict(num_experts=128, top_k=8),
  ),
  "3_235b_a22b": dict(
    attention=dict(num_heads=64, num_kv_heads=4, head_dim=128, qk_norm="head"),
    model=dict(model_dim=4096, segments=(("attention:moe", 94),)),
    moe=dict(hidden_dim=1536),
    router=dict(num_experts=128, top_k=8),
  ),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  config = dict(TINY_RUN if variant == "tiny" else PUBLISHED_RUN)
  config["model"] = dict(**size["model"], **size["attention"], rope_theta=1e6, norm_epsilon=1e-6)
  config["moe"] = dict(
    **size["moe"],
    gated=True,
    activation="silu",
    dispatch="ragged",
    **to_mapping(preset("qwen3_moe", **size["router"])),
  )
  if variant != "tiny":
    config["model"] |= dict(vocab_size=151_936, **PUBLISHED_MODEL)
  return full_config(config)
