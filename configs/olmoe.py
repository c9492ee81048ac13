"""OLMoE (arXiv 2409.02060): 64 small experts in every layer, eight a token.

  configs/olmoe.py:tiny   the default; a minute on a CPU, most of it to compile
  configs/olmoe.py:1b_7b  6.92 B total, 1.28 B active, 7.88 GFLOP

Sizes are those of the release. Queries and keys are normalised over the whole projection, router
weights are not renormalised.

GFLOP: to train on a token of a sequence of 4,096. Memory and more:
`moe-jax plan --config=configs/olmoe.py:1b_7b`.
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
    layers=2, model_dim=32, hidden_dim=32, num_heads=4, head_dim=8, num_experts=8, top_k=2
  ),
  "1b_7b": dict(
    layers=16, model_dim=2048, hidden_dim=1024, num_heads=16, head_dim=128, num_experts=64, top_k=8
  ),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  config = dict(TINY_RUN if variant == "tiny" else PUBLISHED_RUN)
  config["model"] = dict(
    model_dim=size["model_dim"],
    segments=(("attention:moe", size["layers"]),),
    num_heads=size["num_heads"],
    num_kv_heads=size["num_heads"],
    head_dim=size["head_dim"],
    rope_theta=10_000.0,
    qk_norm="projection",
    qk_norm_epsilon=1e-5,
    norm_epsilon=1e-5,
  )
  config["moe"] = dict(
    hidden_dim=size["hidden_dim"],
    gated=True,
    activation="silu",
    dispatch="ragged",
    **to_mapping(preset("olmoe", num_experts=size["num_experts"], top_k=size["top_k"])),
  )
  if variant != "tiny":
    config["model"] |= dict(vocab_size=50_304, **PUBLISHED_MODEL)
  return full_config(config)
