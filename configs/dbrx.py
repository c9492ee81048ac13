"""DBRX: 16 experts in every layer, four a token.

  configs/dbrx.py:tiny  the default; a minute on a CPU, most of it to compile
  configs/dbrx.py:base  131.60 B total, 36.47 B active, 221 GFLOP

Size of the release, for which there is no paper: LayerNorm without biases, queries, keys and values
clipped to [-8, 8], router weights renormalised, no drops. Its balance loss, 0.05 in the release, is
read as Mixtral's.

GFLOP: to train on a token of a sequence of 4,096. Memory and more:
`moe-jax plan --config=configs/dbrx.py:base`.
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
  "base": dict(
    model=dict(
      vocab_size=100_352,
      model_dim=6144,
      segments=(("attention:moe", 40),),
      num_heads=48,
      num_kv_heads=8,
      head_dim=128,
    ),
    hidden_dim=10752,
    router=dict(num_experts=16, top_k=4),
  ),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  config = dict(TINY_RUN if variant == "tiny" else PUBLISHED_RUN)
  config["model"] = dict(
    **size["model"],
    rope_theta=500_000.0,
    qkv_clip=8.0,
    norm="layernorm_no_bias",
    norm_epsilon=1e-5,
  )
  router = preset("mixtral", **size["router"], weighting="renormalized", balance_loss_weight=0.05)
  config["moe"] = dict(
    hidden_dim=size["hidden_dim"],
    gated=True,
    activation="silu",
    dispatch="ragged",
    **to_mapping(router),
  )
  if variant != "tiny":
    config["model"] |= PUBLISHED_MODEL
  return full_config(config)
