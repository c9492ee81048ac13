"""GLM-4.5 (arXiv 2508.06471): DeepSeek-V3's router without expert groups, grouped-query attention.

  configs/glm4_moe.py:tiny     the default; a minute on a CPU, most of it to compile
  configs/glm4_moe.py:4_5_air  106.85 B total, 13.42 B active, 90.7 GFLOP
  configs/glm4_moe.py:4_5      352.80 B total, 33.63 B active, 225 GFLOP

Sizes are those of the releases, without the module that predicts a second token
(`--config.model.mtp_depth=1`; the published 355 B count it, and no embeddings). One shared expert,
one or three dense layers first, half of each head rotated, biases on queries, keys and values;
GLM-4.5 normalises queries and keys of each head.

GFLOP: to train on a token of a sequence of 4,096. Memory and more:
`moe-jax plan --config=configs/glm4_moe.py:4_5`.
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

_HEADS = dict(num_heads=96, num_kv_heads=8, head_dim=128, rotary_dim=64)

VARIANTS = {
  "tiny": dict(
    layers=(1, 2),
    model_dim=32,
    attention=dict(num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=4, qk_norm="head"),
    dense_hidden_dim=64,
    hidden_dim=32,
    router=dict(num_experts=8, top_k=2),
  ),
  "4_5_air": dict(
    layers=(1, 45),
    model_dim=4096,
    attention=_HEADS,
    dense_hidden_dim=10944,
    hidden_dim=1408,
    router=dict(num_experts=128, top_k=8, weight_scale=1.0),
  ),
  "4_5": dict(
    layers=(3, 89),
    model_dim=5120,
    attention=dict(**_HEADS, qk_norm="head"),
    dense_hidden_dim=12288,
    hidden_dim=1536,
    router=dict(num_experts=160, top_k=8, weight_scale=2.5),
  ),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  dense, sparse = size["layers"]
  config = dict(TINY_RUN if variant == "tiny" else PUBLISHED_RUN)
  config["model"] = dict(
    model_dim=size["model_dim"],
    segments=(("attention:dense", dense), ("attention:moe", sparse)),
    **size["attention"],
    rope_theta=1e6,
    qkv_bias=True,
    qk_norm_epsilon=1e-5,
    mlp=dict(hidden_dim=size["dense_hidden_dim"], gated=True, activation="silu"),
    norm_epsilon=1e-5,
  )
  router = preset("deepseek_v3", num_expert_groups=1, top_expert_groups=1, **size["router"])
  config["moe"] = dict(
    hidden_dim=size["hidden_dim"],
    shared_hidden_dim=size["hidden_dim"],
    gated=True,
    activation="silu",
    dispatch="ragged",
    **to_mapping(router),
  )
  if variant != "tiny":
    config["model"] |= dict(vocab_size=151_552, **PUBLISHED_MODEL)
  return full_config(config)
