"""Llama 4: one routed and one shared expert a token, and a tower that reads images.

  configs/llama4.py:tiny           the default, Maverick's; a minute on a CPU, most of it to compile
  configs/llama4.py:tiny_vision    the same with a tower for images of 16 x 16
  configs/llama4.py:scout          108.64 B total, 18.04 B active, 103 GFLOP
  configs/llama4.py:maverick       401.58 B total, 18.06 B active, 103 GFLOP
  configs/llama4.py:scout_text     107.77 B total, 17.17 B active, 103 GFLOP
  configs/llama4.py:maverick_text  400.71 B total, 17.18 B active, 103 GFLOP

Sizes are those of the releases, for which there is no paper. The vision tower, 0.87 B in both, cuts
336 x 336 pixels into 24 x 24 patches, of which 2 x 2 become a token; variants `_text` are without.
Images for training come from TFDS data sets, see `configs/imagenet.py`.

Scout has 16 experts in every layer, Maverick 128 in every other one. Three layers of four attend
within chunks of 8,192 positions, with rotary positions; the fourth sees everything, without
positions, its queries scaled by the logarithm of their place. A router's score multiplies the
expert's input.

GFLOP: to train on a token of text, of a sequence of 4,096. Memory and more:
`moe-jax plan --config=configs/llama4.py:maverick`.
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

_EVERY_LAYER = "attention:moe attention:moe attention:moe global_attention:moe"
_EVERY_OTHER_LAYER = "attention:dense attention:moe attention:dense global_attention:moe"
_HEADS = dict(num_heads=40, num_kv_heads=8, head_dim=128)
_IMAGE_TOKEN = 200_092

_WITH_TOWER = {
  "tiny_vision": dict(
    model=dict(model_dim=32, segments=((_EVERY_OTHER_LAYER, 1),)),
    heads=dict(num_heads=4, num_kv_heads=2, head_dim=8),
    local=dict(chunk=16, qk_norm="l2"),
    dense_hidden_dim=64,
    hidden_dim=32,
    num_experts=8,
    floor=16,
    # Behind the 259 ids of the byte tokenizer.
    vocab_size=260,
    vision=dict(
      image_token=259,
      model_dim=16,
      num_layers=2,
      num_heads=2,
      hidden_dim=64,
      adapter_dim=24,
      image_size=16,
      patch_size=4,
    ),
  ),
  "scout": dict(
    model=dict(model_dim=5120, segments=((_EVERY_LAYER, 12),)),
    heads=_HEADS,
    local=dict(
      chunk=8192,
      qk_norm="l2",
      rope_scaling=dict(
        kind="llama3",
        factor=16.0,
        original_max_position=8192,
        low_freq_factor=1.0,
        high_freq_factor=1.0,
      ),
    ),
    dense_hidden_dim=None,
    hidden_dim=8192,
    num_experts=16,
    floor=8192,
    vocab_size=202_048,
    vision=dict(image_token=_IMAGE_TOKEN),
  ),
  "maverick": dict(
    model=dict(model_dim=5120, segments=((_EVERY_OTHER_LAYER, 12),)),
    heads=_HEADS,
    local=dict(chunk=8192),
    dense_hidden_dim=16384,
    hidden_dim=8192,
    num_experts=128,
    floor=8192,
    vocab_size=202_048,
    vision=dict(image_token=_IMAGE_TOKEN),
  ),
}


def _without_tower(name: str) -> dict:
  return {**_WITH_TOWER[name], "vision": None}


VARIANTS = {
  "tiny": _without_tower("tiny_vision"),
  **_WITH_TOWER,
  "scout_text": _without_tower("scout"),
  "maverick_text": _without_tower("maverick"),
}


def get_config(variant: str = "tiny") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  size = choose_variant(variant, VARIANTS)
  tiny = variant.startswith("tiny")
  config = dict(TINY_RUN if tiny else PUBLISHED_RUN)
  config["model"] = dict(
    **size["model"],
    **size["heads"],
    **size["local"],
    rope_theta=500_000.0,
    rotary_layout="pairs",
    qk_norm_epsilon=1e-5,
    global_attention=dict(
      **size["heads"],
      positions="none",
      query_temperature_floor=size["floor"],
      query_temperature_scale=0.1,
    ),
    norm_epsilon=1e-5,
  )
  if size["dense_hidden_dim"]:
    config["model"]["mlp"] = dict(
      hidden_dim=size["dense_hidden_dim"], gated=True, activation="silu"
    )
  config["moe"] = dict(
    hidden_dim=size["hidden_dim"],
    shared_hidden_dim=size["hidden_dim"],
    gated=True,
    activation="silu",
    dispatch="ragged",
    **to_mapping(preset("llama4", num_experts=size["num_experts"])),
  )
  if size["vision"]:
    config["model"]["vision"] = size["vision"]
  if size["vision"] or not tiny:
    config["model"]["vocab_size"] = size["vocab_size"]
  if not tiny:
    config["model"] |= PUBLISHED_MODEL
  return full_config(config)
