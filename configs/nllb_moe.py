"""NLLB-MoE (arXiv 2207.04672): translation between 200 languages, experts in every fourth layer.

  configs/nllb_moe.py:tiny  the default; a minute on a CPU, most of it to compile
  configs/nllb_moe.py:54b  54.50 B total, 3.75 B active, 28.5 GFLOP

Sizes are those of the release. Training here predicts the second half of a text from the first,
where the authors had sentence pairs, and leaves out their masking of experts' outputs. A token of
`plan` is one of the encoder and one of the decoder together.

GFLOP: to train on such a token of sequences of 4,096. Memory and more:
`moe-jax plan --config=configs/nllb_moe.py:54b`.
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
  "tiny": dict(layers=4, model_dim=32, hidden_dim=64, num_heads=4, num_experts=4),
  "54b": dict(layers=24, model_dim=2048, hidden_dim=8192, num_heads=16, num_experts=128),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  tiny = variant == "tiny"
  attention = dict(
    num_heads=size["num_heads"],
    num_kv_heads=size["num_heads"],
    head_dim=size["model_dim"] // size["num_heads"],
    positions="none",
    qkv_bias=True,
    out_bias=True,
  )
  segments = ((" ".join(["attention:dense"] * 3 + ["attention:moe"]), size["layers"] // 4),)
  config = dict(TINY_RUN if tiny else PUBLISHED_RUN)
  # Sentence pairs are another data set's matter: the second half of a text stands for one.
  config["objective"] = dict(kind="second_half")
  config["model"] = dict(
    model_dim=size["model_dim"],
    segments=segments,
    **attention,
    encoder=dict(segments=segments, attention=attention, start_token=2),
    cross_attention=attention,
    mlp=dict(hidden_dim=size["hidden_dim"], bias=True),
    norm="layernorm",
    norm_epsilon=1e-5,
    position_embedding="sinusoidal",
    position_offset=2,
    embedding_multiplier=size["model_dim"] ** 0.5,
    tie_embeddings=True,
  )
  config["moe"] = dict(
    hidden_dim=size["hidden_dim"],
    expert_bias=True,
    dispatch="gather",
    **to_mapping(preset("nllb", num_experts=size["num_experts"])),
  )
  if not tiny:
    config["model"] |= dict(vocab_size=256_206, **PUBLISHED_MODEL)
  return full_config(config)
