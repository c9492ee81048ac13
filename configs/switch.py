"""Switch Transformers (arXiv 2101.03961): T5 with one expert a token in every other layer.

  configs/switch.py:tiny       the default; a minute on a CPU, most of it to compile
  configs/switch.py:base_8     619 M total, 223 M active, 2.5 GFLOP
  configs/switch.py:base_16    1.07 B total, 223 M active, 2.5 GFLOP
  configs/switch.py:base_32    1.98 B total, 223 M active, 2.5 GFLOP
  configs/switch.py:base_64    3.79 B total, 223 M active, 2.5 GFLOP
  configs/switch.py:base_128   7.42 B total, 224 M active, 2.5 GFLOP
  configs/switch.py:base_256   14.66 B total, 225 M active, 2.5 GFLOP
  configs/switch.py:large_128  26.31 B total, 741 M active, 7.5 GFLOP
  configs/switch.py:xxl        394.68 B total, 11.15 B active, 78.2 GFLOP
  configs/switch.py:c          1,571.33 B total, 1.75 B active, 13.6 GFLOP

Switch-C has experts in every layer; Switch-XXL has gated networks, a head of its own, and 128
experts: Table 9 prints 64, which with its other figures comes to about half of its 395 B.
Pre-training hides 15 % of the tokens in spans. A token of `plan` is one of the encoder and one of
the decoder together.

GFLOP: to train on such a token of sequences of 4,096. Memory and more:
`moe-jax plan --config=configs/switch.py:base_128`.
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

_BASE = dict(layers=12, model_dim=768, hidden_dim=3072, num_heads=12)
VARIANTS = {
  "tiny": dict(layers=2, model_dim=32, hidden_dim=64, num_heads=4, head_dim=8, num_experts=4),
  **{f"base_{experts}": dict(_BASE, num_experts=experts) for experts in (8, 16, 32, 64, 128, 256)},
  "large_128": dict(layers=24, model_dim=1024, hidden_dim=4096, num_heads=16, num_experts=128),
  "xxl": dict(
    layers=24,
    model_dim=4096,
    hidden_dim=10_240,
    num_heads=64,
    num_experts=128,
    gated=True,
    tied=False,
  ),
  "c": dict(
    layers=15,
    model_dim=2080,
    hidden_dim=6144,
    num_heads=30,
    num_experts=2048,
    all_sparse=True,
    tied=False,
  ),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  tiny, tied = variant == "tiny", size.get("tied", True)
  network = dict(
    hidden_dim=size["hidden_dim"],
    **(dict(gated=True, activation="gelu") if size.get("gated") else dict(activation="relu")),
  )
  segments = (
    (("attention:moe", size["layers"]),)
    if size.get("all_sparse")
    else (("attention:dense attention:moe", size["layers"] // 2),)
  )
  plain = dict(
    num_heads=size["num_heads"],
    num_kv_heads=size["num_heads"],
    head_dim=size.get("head_dim", 64),
    positions="none",
    softmax_scale=1.0,
  )
  attention = plain | dict(
    relative_bias_buckets=8 if tiny else 32,
    relative_bias_max_distance=32 if tiny else 128,
    relative_bias_shared=True,
  )
  config = dict(TINY_RUN if tiny else PUBLISHED_RUN)
  # Pre-training hides 15 % of the tokens (section 3.1).
  config["objective"] = dict(kind="span_corruption")
  config["model"] = dict(
    model_dim=size["model_dim"],
    segments=segments,
    **attention,
    encoder=dict(segments=segments, attention=attention),
    cross_attention=plain,
    # Appendix A and Table 9 name the layers; the released code scales a tied head's input.
    tie_embeddings=tied,
    logits_divisor=size["model_dim"] ** 0.5 if tied else 1.0,
    init_scale=0.1,
    dropout=0.0,
    # Names of hidden spans stand behind the tokenizer's ids.
    vocab_size=288 if tiny else 32_128,
    **({} if tiny else PUBLISHED_MODEL),
  )
  if not size.get("all_sparse"):
    config["model"]["mlp"] = network
  config["moe"] = dict(
    network,
    router_jitter=0.01,
    dispatch="gather",
    **to_mapping(preset("switch", num_experts=size["num_experts"])),
  )
  return full_config(config)
