"""Phi-3.5-MoE, trained as GRIN (arXiv 2409.12136): 16 experts, two a token by SparseMixer.

  configs/phi_moe.py:tiny  the default; a minute on a CPU, most of it to compile
  configs/phi_moe.py:3_5   41.87 B total, 6.64 B active, 42.3 GFLOP

Size of the release: LayerNorm, and biases in attention and on the logits. Its stretching of rotary
positions beyond 4,096 (longrope) is left out; a checkpoint that is loaded has it.

GFLOP: to train on a token of a sequence of 4,096. Memory and more:
`moe-jax plan --config=configs/phi_moe.py:3_5`.
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
    num_experts=8,
  ),
  "3_5": dict(
    model=dict(
      vocab_size=32_064,
      model_dim=4096,
      segments=(("attention:moe", 32),),
      num_heads=32,
      num_kv_heads=8,
      head_dim=128,
    ),
    hidden_dim=6400,
    num_experts=16,
  ),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  config = dict(TINY_RUN if variant == "tiny" else PUBLISHED_RUN)
  config["model"] = dict(
    **size["model"],
    rope_theta=10_000.0,
    qkv_bias=True,
    out_bias=True,
    head_bias=True,
    norm="layernorm",
    norm_epsilon=1e-5,
  )
  config["moe"] = dict(
    hidden_dim=size["hidden_dim"],
    gated=True,
    activation="silu",
    dispatch="ragged",
    **to_mapping(preset("grin", num_experts=size["num_experts"])),
  )
  if variant != "tiny":
    config["model"] |= PUBLISHED_MODEL
  return full_config(config)
