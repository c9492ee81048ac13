"""Jamba (arXiv 2403.19887): one attention layer of eight, the others Mamba; experts in every other.

  configs/jamba.py:tiny  the default; a minute on a CPU, most of it to compile
  configs/jamba.py:v0_1  51.57 B total, 12.11 B active, 71.5 GFLOP

Sizes are those of the release. Attention has no positions: the Mamba layers before it know the
order. Router weights are not renormalised. What decoding keeps of a sequence grows with its length
in the attention layers alone.

GFLOP: to train on a token of a sequence of 4,096. Memory and more:
`moe-jax plan --config=configs/jamba.py:v0_1`.
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
    model_dim=32,
    pattern="mamba:dense mamba:moe attention:dense mamba:moe",
    repeats=1,
    heads=dict(num_heads=4, num_kv_heads=2, head_dim=8),
    mamba=dict(inner_dim=64, step_rank=4, state_dim=8, scan_chunk=16),
    hidden_dim=32,
    num_experts=8,
  ),
  "v0_1": dict(
    model_dim=4096,
    pattern=(
      "mamba:dense mamba:moe mamba:dense mamba:moe attention:dense mamba:moe mamba:dense mamba:moe"
    ),
    repeats=4,
    heads=dict(num_heads=32, num_kv_heads=8, head_dim=128),
    mamba=dict(inner_dim=8192, step_rank=256),
    hidden_dim=14336,
    num_experts=16,
  ),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  network = dict(hidden_dim=size["hidden_dim"], gated=True, activation="silu")
  config = dict(TINY_RUN if variant == "tiny" else PUBLISHED_RUN)
  config["model"] = dict(
    model_dim=size["model_dim"],
    segments=((size["pattern"], size["repeats"]),),
    **size["heads"],
    positions="none",
    mamba=size["mamba"],
    mlp=network,
  )
  config["moe"] = dict(
    **network,
    dispatch="ragged",
    **to_mapping(preset("jamba", num_experts=size["num_experts"])),
  )
  if variant != "tiny":
    config["model"] |= dict(vocab_size=65_536, **PUBLISHED_MODEL)
  return full_config(config)
