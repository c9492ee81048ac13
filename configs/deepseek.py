"""DeepSeek's mixtures of experts: MoE 16B (arXiv 2401.06066), V2 (2405.04434), V3 (2412.19437).

  configs/deepseek.py:tiny     the default, V3's; a minute on a CPU, most of it to compile
  configs/deepseek.py:moe_16b  16.38 B total, 2.83 B active, 17.1 GFLOP
  configs/deepseek.py:v2_lite  15.71 B total, 2.66 B active, 16.4 GFLOP
  configs/deepseek.py:v2       235.74 B total, 21.38 B active, 155 GFLOP
  configs/deepseek.py:v3       671.03 B total, 37.55 B active, 250 GFLOP

Sizes are those of the releases. Many small experts of which some are shared, after one to three
dense layers; from V2 on latent attention; in V3 sigmoid scores, a selection bias, and in training a
module that predicts a second token, 11.61 B more, which these counts leave out. YaRN stretches
4,096 positions 40 times; its m(s) is the paper's 0.0707 ln s + 1 in V2 (section 3.1.4), in V3
0.1 ln s + 1.

GFLOP: to train on a token of a sequence of 4,096. Memory and more:
`moe-jax plan --config=configs/deepseek.py:v3`.
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


def _yarn(mscale: float) -> dict:
  return dict(
    kind="yarn", factor=40.0, original_max_position=4096, mscale=mscale, mscale_all_dim=mscale
  )


def _latent(num_heads: int, query_rank: int | None, mscale: float) -> dict:
  return dict(
    num_heads=num_heads,
    query_rank=query_rank,
    kv_rank=512,
    nope_dim=128,
    rope_dim=64,
    value_dim=128,
    rope_scaling=_yarn(mscale),
  )


VARIANTS = {
  "tiny": dict(
    model=dict(
      model_dim=32,
      segments=(("latent_attention:dense", 1), ("latent_attention:moe", 2)),
      latent_attention=dict(
        num_heads=2, query_rank=16, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=8
      ),
      mlp=dict(hidden_dim=64, gated=True, activation="silu"),
      mtp_depth=1,
    ),
    moe=dict(hidden_dim=32, shared_hidden_dim=32),
    router=preset("deepseek_v3", num_experts=8, top_k=2, num_expert_groups=4, top_expert_groups=2),
  ),
  "moe_16b": dict(
    model=dict(
      vocab_size=102_400,
      model_dim=2048,
      segments=(("attention:dense", 1), ("attention:moe", 27)),
      num_heads=16,
      num_kv_heads=16,
      head_dim=128,
      mlp=dict(hidden_dim=10944, gated=True, activation="silu"),
    ),
    moe=dict(hidden_dim=1408, shared_hidden_dim=2 * 1408),
    router=preset("deepseek_moe"),
  ),
  "v2_lite": dict(
    model=dict(
      vocab_size=102_400,
      model_dim=2048,
      segments=(("latent_attention:dense", 1), ("latent_attention:moe", 26)),
      latent_attention=_latent(16, None, 0.707),
      mlp=dict(hidden_dim=10944, gated=True, activation="silu"),
    ),
    moe=dict(hidden_dim=1408, shared_hidden_dim=2 * 1408),
    router=preset(
      "deepseek_v2",
      num_experts=64,
      num_expert_groups=1,
      top_expert_groups=1,
      weight_scale=1.0,
      # All experts on one device: there is nothing to balance among devices.
      device_loss_weight=0.0,
      communication_loss_weight=0.0,
    ),
  ),
  "v2": dict(
    model=dict(
      vocab_size=102_400,
      model_dim=5120,
      segments=(("latent_attention:dense", 1), ("latent_attention:moe", 59)),
      latent_attention=_latent(128, 1536, 0.707),
      mlp=dict(hidden_dim=12288, gated=True, activation="silu"),
    ),
    moe=dict(hidden_dim=1536, shared_hidden_dim=2 * 1536),
    router=preset("deepseek_v2"),
  ),
  "v3": dict(
    model=dict(
      vocab_size=129_280,
      model_dim=7168,
      segments=(("latent_attention:dense", 3), ("latent_attention:moe", 58)),
      latent_attention=_latent(128, 1536, 1.0),
      mlp=dict(hidden_dim=18432, gated=True, activation="silu"),
      mtp_depth=1,
    ),
    moe=dict(hidden_dim=2048, shared_hidden_dim=2048),
    router=preset("deepseek_v3"),
  ),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  config = dict(TINY_RUN if variant == "tiny" else PUBLISHED_RUN)
  config["model"] = dict(**size["model"], norm_epsilon=1e-6)
  config["moe"] = dict(
    **size["moe"], gated=True, activation="silu", dispatch="ragged", **to_mapping(size["router"])
  )
  if variant != "tiny":
    config["model"] |= PUBLISHED_MODEL
  return full_config(config)
