"""Mixtral (arXiv 2401.04088): every feed-forward is a mixture of 8 experts, two a token.

  configs/mixtral.py:tiny   the default; a minute on a CPU, most of it to compile
  configs/mixtral.py:8x7b   46.70 B total, 12.88 B active, 79.7 GFLOP
  configs/mixtral.py:8x22b  140.62 B total, 39.15 B active, 242 GFLOP

The names multiply what only the experts have eight times: 8x7B is not 56 B, 8x22B not 176 B.
Sizes are those of the releases (8x22B: v0.1, with a vocabulary of 32,000).

GFLOP: to train on a token of a sequence of 4,096. Memory and more:
`moe-jax plan --config=configs/mixtral.py:8x7b`.
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
  "tiny": dict(layers=2, model_dim=32, hidden_dim=64, num_heads=4, num_kv_heads=2, head_dim=8),
  "8x7b": dict(
    layers=32, model_dim=4096, hidden_dim=14336, num_heads=32, num_kv_heads=8, head_dim=128
  ),
  "8x22b": dict(
    layers=56, model_dim=6144, hidden_dim=16384, num_heads=48, num_kv_heads=8, head_dim=128
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
    num_kv_heads=size["num_kv_heads"],
    head_dim=size["head_dim"],
    rope_theta=1e6,
    norm_epsilon=1e-5,
  )
  config["moe"] = dict(
    hidden_dim=size["hidden_dim"],
    gated=True,
    activation="silu",
    dispatch="ragged",
    **to_mapping(preset("mixtral")),
  )
  if variant != "tiny":
    config["model"] |= dict(vocab_size=32_000, **PUBLISHED_MODEL)
  return full_config(config)
