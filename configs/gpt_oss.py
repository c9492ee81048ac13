"""gpt-oss (arXiv 2508.10925): 32 or 128 experts in every layer, four a token, biases everywhere.

  configs/gpt_oss.py:tiny  the default; a minute on a CPU, most of it to compile
  configs/gpt_oss.py:20b   20.91 B total, 4.19 B active, 22.9 GFLOP
  configs/gpt_oss.py:120b  116.83 B total, 5.71 B active, 32.7 GFLOP

The report's active figures, 3.6 B and 5.1 B, leave the input embedding out. Layers alternate
between a window of 128 tokens and all of them; a learned logit per head joins the softmax; experts
clamp their gated activation at 7. YaRN stretches 4,096 positions 32 times.

GFLOP: to train on a token of a sequence of 4,096. Memory and more:
`moe-jax plan --config=configs/gpt_oss.py:20b`.
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

_PUBLISHED = dict(
  model_dim=2880,
  hidden_dim=2880,
  heads=dict(num_heads=64, num_kv_heads=8, head_dim=64),
  window=128,
  original_max_position=4096,
)

VARIANTS = {
  "tiny": dict(
    repeats=1,
    num_experts=8,
    model_dim=32,
    hidden_dim=32,
    heads=dict(num_heads=4, num_kv_heads=2, head_dim=8),
    window=16,
    original_max_position=64,
  ),
  "20b": dict(**_PUBLISHED, repeats=12, num_experts=32),
  "120b": dict(**_PUBLISHED, repeats=18, num_experts=128),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  config = dict(TINY_RUN if variant == "tiny" else PUBLISHED_RUN)
  attention = dict(
    **size["heads"],
    rope_theta=150_000.0,
    rope_scaling=dict(
      kind="yarn",
      factor=32.0,
      original_max_position=size["original_max_position"],
      truncate=False,
    ),
    qkv_bias=True,
    out_bias=True,
    sinks=True,
  )
  config["model"] = dict(
    model_dim=size["model_dim"],
    segments=(("attention:moe global_attention:moe", size["repeats"]),),
    **attention,
    window=size["window"],
    global_attention=attention,
    norm_epsilon=1e-5,
  )
  config["moe"] = dict(
    hidden_dim=size["hidden_dim"],
    gated=True,
    activation="shifted_quick_gelu",
    clamp=7.0,
    expert_bias=True,
    dispatch="ragged",
    **to_mapping(preset("gpt_oss", num_experts=size["num_experts"])),
  )
  if variant != "tiny":
    config["model"] |= dict(vocab_size=201_088, **PUBLISHED_MODEL)
  return full_config(config)
