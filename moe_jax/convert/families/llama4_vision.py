"""Llama 4 Scout and Maverick with their vision tower (released code; no report)."""

import dataclasses
from typing import Any

from moe_jax.convert.families.llama4 import LLAMA4
from moe_jax.convert.family import Family
from moe_jax.convert.hub_config import CONFIG_FILE, HubConfig
from moe_jax.convert.parts import HEADS, attention, matrix, norm
from moe_jax.convert.rules import rule
from moe_jax.convert.transforms import LINEAR, SAME
from moe_jax.errors import UserError
from moe_jax.models import ModelConfig, VisionConfig

# What the library's class has where a file says nothing; its rotary base is everybody's.
_IMAGE_TOKEN = 200_092
_DEFAULTS = dict(
  hidden_size=768,
  num_hidden_layers=34,
  num_attention_heads=16,
  num_channels=3,
  intermediate_size=5632,
  vision_output_dim=7680,
  image_size=448,
  patch_size=14,
  pixel_shuffle_ratio=0.5,
  projector_input_dim=4096,
  projector_output_dim=4096,
)


def _read(hub: HubConfig) -> ModelConfig:
  text = LLAMA4.read(hub.section("text_config"))
  if text.tie_embeddings != bool(hub.get("tie_word_embeddings", text.tie_embeddings)):
    raise UserError(
      f"{CONFIG_FILE} has another tie_word_embeddings than its text_config, which is not supported:"
      " expected the same"
    )
  vision = hub.section("vision_config").with_defaults(**_DEFAULTS)
  image_token = hub.get("image_token_index", hub.get("image_token_id", _IMAGE_TOKEN))
  try:
    return dataclasses.replace(text, vision=_read_vision(vision, image_token))
  except UserError as error:
    raise UserError(f"in vision_config, {error}") from None


def _read_vision(hub: HubConfig, image_token: int) -> VisionConfig:
  # The library's code computes so whatever the file says.
  hub.only("hidden_act", "gelu")
  hub.only("norm_eps", 1e-5)
  hub.only("multi_modal_projector_bias", False)
  hub.only("vision_feature_select_strategy", "default")
  theta, scaling = hub.rope()
  if scaling is not None:
    raise UserError(
      f"{CONFIG_FILE} has the rope scaling {str(scaling.kind)!r}, which is not supported: expected"
      " default"
    )
  side = _patches_per_token(hub.get("pixel_shuffle_ratio"))
  width, adapter = hub.get("hidden_size"), hub.get("projector_output_dim")
  # These matrices follow each other, so their widths are one number.
  for name in ("projector_input_dim", "vision_output_dim"):
    hub.only(name, adapter)
  hub.only("intermediate_size", width * side**2)
  return VisionConfig(
    image_token=image_token,
    model_dim=width,
    num_layers=hub.get("num_hidden_layers"),
    num_heads=hub.get("num_attention_heads"),
    hidden_dim=hub.get("intermediate_size"),
    adapter_dim=adapter,
    image_size=_side(hub, "image_size"),
    patch_size=_side(hub, "patch_size"),
    num_channels=hub.get("num_channels"),
    pixel_shuffle=side,
    rope_theta=theta,
  )


def _patches_per_token(ratio: float) -> int:
  """Returns the rows of patches that one token stands for."""
  side = round(1 / ratio) if ratio else 0
  if side < 1 or abs(side * ratio - 1) > 1e-6:
    raise UserError(
      f"{CONFIG_FILE} has pixel_shuffle_ratio = {ratio}, which is not supported: expected one over"
      " a whole number, for example 0.5"
    )
  return side


def _side(hub: HubConfig, name: str) -> int:
  """Returns the rows, and the columns, of a square."""
  given = hub.get(name)
  if not isinstance(given, int):
    raise UserError(
      f"{CONFIG_FILE} has {name} = {given}, which is not supported: expected one number, the rows"
      " and the columns of a square"
    )
  return given


def _write(config: ModelConfig) -> dict[str, Any]:
  text = dataclasses.replace(config, vision=None)
  return {
    "text_config": {"model_type": LLAMA4.model_type, **LLAMA4.write(text)},
    "vision_config": {"model_type": "llama4_vision_model", **_write_vision(config.vision)},
    "image_token_index": config.vision.image_token,
    "tie_word_embeddings": config.tie_embeddings,
  }


def _write_vision(c: VisionConfig) -> dict[str, Any]:
  return {
    "hidden_size": c.model_dim,
    "num_hidden_layers": c.num_layers,
    "num_attention_heads": c.num_heads,
    "num_channels": c.num_channels,
    "intermediate_size": c.hidden_dim,
    "image_size": c.image_size,
    "patch_size": c.patch_size,
    "pixel_shuffle_ratio": 1 / c.pixel_shuffle,
    "projector_input_dim": c.adapter_dim,
    "projector_output_dim": c.adapter_dim,
    "vision_output_dim": c.adapter_dim,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "rope_theta": c.rope_theta,
  }


_TOWER = "vision_model."
_BLOCK = _TOWER + "model.layers.{vision_layer}."

_VISION = (
  rule(_TOWER + "patch_embedding.linear.weight", "vision.patch_embedding", LINEAR),
  rule(_TOWER + "class_embedding", "vision.class_embedding", SAME),
  rule(_TOWER + "positional_embedding_vlm", "vision.position_embedding", SAME),
  *norm(_TOWER + "layernorm_pre", "vision.first_norm"),
  *norm(_BLOCK + "input_layernorm", "mixer_norm"),
  *attention(_BLOCK + "self_attn", "mixer", HEADS),
  *norm(_BLOCK + "post_attention_layernorm", "feed_forward_norm"),
  *matrix(_BLOCK + "mlp.fc1", "feed_forward.weights.up"),
  *matrix(_BLOCK + "mlp.fc2", "feed_forward.weights.down"),
  *norm(_TOWER + "layernorm_post", "vision.final_norm"),
  rule(_TOWER + "vision_adapter.mlp.fc1.weight", "vision.adapter_in", LINEAR),
  rule(_TOWER + "vision_adapter.mlp.fc2.weight", "vision.adapter_out", LINEAR),
  rule("multi_modal_projector.linear_1.weight", "vision.projection", LINEAR),
)

LLAMA4_MULTIMODAL = Family(
  architecture="Llama4ForConditionalGeneration",
  model_type="llama4",
  mixers=LLAMA4.mixers,
  read=_read,
  write=_write,
  rules=(
    *(dataclasses.replace(each, hub="language_model." + each.hub) for each in LLAMA4.rules),
    *_VISION,
  ),
  ignored=LLAMA4.ignored,
  vision=True,
)
