"""GShard (arXiv 2006.16668): translation by two experts a token in every other layer.

  configs/gshard.py:tiny   the default; a minute on a CPU, most of it to compile
  configs/gshard.py:600b   619.33 B total, 1.46 B active, 13.3 GFLOP
  configs/gshard.py:200b   206.49 B total, 531 M active, 4.7 GFLOP
  configs/gshard.py:150b   155.45 B total, 1.43 B active, 13.1 GFLOP
  configs/gshard.py:50b    51.86 B total, 522 M active, 4.6 GFLOP
  configs/gshard.py:37b    39.48 B total, 1.43 B active, 13.1 GFLOP
  configs/gshard.py:12_5b  13.20 B total, 519 M active, 4.6 GFLOP

The names are the sizes of its Table 1, whose "36L" are 18 layers of the encoder and 18 of the
decoder: only so do widths of 1,024 and 8,192 come to them. With a vocabulary of 64,000 (the paper
tells none) the largest has 619 B, and no rounding makes 600 B of that. Its sentence pairs are not
public; training here predicts the second half of a text from the first. A token of `plan` is one of
the encoder and one of the decoder together.

GFLOP: to train on such a token of sequences of 4,096. Memory and more:
`moe-jax plan --config=configs/gshard.py:600b`.
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

# The names are Table 1's sizes; 36 layers are 18 in the encoder and 18 in the decoder.
VARIANTS = {
  "tiny": dict(layers=4, num_experts=4),
  "600b": dict(layers=36, num_experts=2048),
  "200b": dict(layers=12, num_experts=2048),
  "150b": dict(layers=36, num_experts=512),
  "50b": dict(layers=12, num_experts=512),
  "37b": dict(layers=36, num_experts=128),
  "12_5b": dict(layers=12, num_experts=128),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  tiny = variant == "tiny"
  width, hidden_dim, heads, head_dim = (32, 64, 4, 8) if tiny else (1024, 8192, 16, 128)
  attention = dict(num_heads=heads, num_kv_heads=heads, head_dim=head_dim, positions="none")
  segments = (("attention:dense attention:moe", size["layers"] // 4),)
  config = dict(TINY_RUN if tiny else PUBLISHED_RUN)
  # Its sentence pairs are not public: the second half of a text stands for the translation.
  config["objective"] = dict(kind="second_half")
  config["model"] = dict(
    model_dim=width,
    segments=segments,
    **attention,
    encoder=dict(segments=segments, attention=attention),
    cross_attention=attention,
    mlp=dict(hidden_dim=hidden_dim),
    # Figure 3: "Add & Norm" behind every part, as in arXiv 1706.03762, whose positions these are.
    norm="rmsnorm",
    norm_placement="post",
    position_embedding="sinusoidal",
    embedding_multiplier=width**0.5,
    tie_embeddings=True,
  )
  config["moe"] = dict(
    hidden_dim=hidden_dim,
    dispatch="einsum",
    **to_mapping(preset("gshard", num_experts=size["num_experts"])),
  )
  if not tiny:
    config["model"] |= dict(vocab_size=64_000, **PUBLISHED_MODEL)
  return full_config(config)
