"""GLaM (arXiv 2112.06905): every other layer is a mixture of 32 to 256 experts, two a token.

  configs/glam.py:tiny       the default; a minute on a CPU, most of it to compile
  configs/glam.py:0_1b       138 M, dense, 0.88 GFLOP
  configs/glam.py:0_1b_64e   1.91 B total, 152 M active, 0.97 GFLOP
  configs/glam.py:1_7b       1.68 B, dense, 10.4 GFLOP
  configs/glam.py:1_7b_32e   13.96 B total, 1.88 B active, 11.6 GFLOP
  configs/glam.py:1_7b_64e   26.84 B total, 1.88 B active, 11.6 GFLOP
  configs/glam.py:1_7b_128e  52.62 B total, 1.88 B active, 11.6 GFLOP
  configs/glam.py:1_7b_256e  104.16 B total, 1.88 B active, 11.6 GFLOP
  configs/glam.py:8b         8.72 B, dense, 53.1 GFLOP
  configs/glam.py:8b_64e     142.94 B total, 9.80 B active, 59.6 GFLOP
  configs/glam.py:137b       137.70 B, dense, 833 GFLOP
  configs/glam.py:64b_64e    1,161.76 B total, 96.60 B active, 586 GFLOP

Sizes are those of the paper's Table 4. Its 64B/64E row needs a vocabulary of 256,000, the smaller
ones 32,000, to give the printed figures; 1.7B/32E is printed as 20 B and is 13.96 B.

The blocks are those of google/praxis, layers/glam.py: the mixture comes first of the two, experts
are plain ReLU networks, dense feed-forwards gated GELU, RMSNorm without biases, a relative position
bias in every layer, unscaled queries and a tied embedding. Sequences of 1,024 tokens.

GFLOP: to train on a token of a sequence of 1,024. Memory and more:
`moe-jax plan --config=configs/glam.py:64b_64e`.
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

_0_1B = dict(layers=12, model_dim=768, hidden_dim=3072, num_heads=12, head_dim=64)
_1_7B = dict(layers=24, model_dim=2048, hidden_dim=8192, num_heads=16, head_dim=128)
_8B = dict(layers=32, model_dim=4096, hidden_dim=16384, num_heads=32, head_dim=128)
_64B = dict(layers=64, model_dim=8192, hidden_dim=32768, num_heads=128, head_dim=128)

VARIANTS = {
  "tiny": dict(layers=4, model_dim=32, hidden_dim=64, num_heads=2, head_dim=16, num_experts=8),
  "0_1b": _0_1B,
  "0_1b_64e": dict(**_0_1B, num_experts=64),
  "1_7b": _1_7B,
  "1_7b_32e": dict(**_1_7B, num_experts=32),
  "1_7b_64e": dict(**_1_7B, num_experts=64),
  "1_7b_128e": dict(**_1_7B, num_experts=128),
  "1_7b_256e": dict(**_1_7B, num_experts=256),
  "8b": _8B,
  "8b_64e": dict(**_8B, num_experts=64),
  "137b": dict(**_64B | dict(hidden_dim=65536)),
  "64b_64e": dict(**_64B, num_experts=64, vocab_size=256_000),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  layers, hidden_dim = size["layers"], size["hidden_dim"]
  config = dict(TINY_RUN if variant == "tiny" else PUBLISHED_RUN)
  config["model"] = dict(
    model_dim=size["model_dim"],
    segments=(("attention:dense", layers),),
    num_heads=size["num_heads"],
    num_kv_heads=size["num_heads"],
    head_dim=size["head_dim"],
    positions="none",
    relative_bias_buckets=32,
    relative_bias_max_distance=128,
    softmax_scale=1.0,
    mlp=dict(hidden_dim=hidden_dim, gated=True, activation="gelu"),
    tie_embeddings=True,
  )
  if variant != "tiny":
    config["data"] = dict(sequence_length=1024)
    config["model"] |= dict(vocab_size=size.get("vocab_size", 32_000), **PUBLISHED_MODEL)
  if "num_experts" in size:
    config["model"]["segments"] = (("attention:moe attention:dense", layers // 2),)
    config["moe"] = dict(
      hidden_dim=hidden_dim,
      activation="relu",
      dispatch="gather",
      **to_mapping(preset("glam", num_experts=size["num_experts"])),
    )
  return full_config(config)
