"""Granite 3.0's mixtures of experts: 32 or 40 small experts in every layer, eight a token.

  configs/granite_moe.py:tiny      the default; a minute on a CPU, most of it to compile
  configs/granite_moe.py:1b_a400m  1.33 B total, 429 M active, 3.18 GFLOP
  configs/granite_moe.py:3b_a800m  3.30 B total, 883 M active, 6.50 GFLOP

Sizes are those of the releases: embedding, residual stream, attention and logits are scaled by
fixed multipliers, and the embedding is tied. The router is Mixtral's.

GFLOP: to train on a token of a sequence of 4,096. Memory and more:
`moe-jax plan --config=configs/granite_moe.py:3b_a800m`.
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

VARIANTS = {
  "tiny": dict(
    model=dict(
      model_dim=32, segments=(("attention:moe", 2),), num_heads=4, num_kv_heads=2, head_dim=8
    ),
    hidden_dim=32,
    router=dict(num_experts=8, top_k=2),
  ),
  "1b_a400m": dict(
    model=dict(
      model_dim=1024, segments=(("attention:moe", 24),), num_heads=16, num_kv_heads=8, head_dim=64
    ),
    hidden_dim=512,
    router=dict(num_experts=32, top_k=8),
  ),
  "3b_a800m": dict(
    model=dict(
      model_dim=1536, segments=(("attention:moe", 32),), num_heads=24, num_kv_heads=8, head_dim=64
    ),
    hidden_dim=512,
    router=dict(num_experts=40, top_k=8),
  ),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  config = dict(TINY_RUN if variant == "tiny" else PUBLISHED_RUN)
  config["model"] = dict(
    **size["model"],
    rope_theta=10_000.0,
    softmax_scale=1 / 64,
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    logits_divisor=6.0,
    tie_embeddings=True,
    norm_epsilon=1e-6,
  )
  config["moe"] = dict(
    hidden_dim=size["hidden_dim"],
    gated=True,
    activation="silu",
    dispatch="ragged",
    **to_mapping(preset("mixtral", **size["router"])),
  )
  if variant != "tiny":
    config["model"] |= dict(vocab_size=49_155, **PUBLISHED_MODEL)
  return full_config(config)
