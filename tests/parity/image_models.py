"""Tiny models that read images, and images with tokens for them; needs transformers."""

import numpy as np
import transformers
from reference_models import CONFIGS as TEXT_CONFIGS

_IMAGE, _BEGIN, _END = 100, 98, 99
# Rows of the text and the first token of every image in it: two in one row show the order.
_PLACES = ((0, 1), (0, 5), (1, 4))


def _llama4(**changes):
  settings = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    image_size=56,
    patch_size=14,
    num_channels=3,
    pixel_shuffle_ratio=0.5,
    projector_input_dim=48,
    projector_output_dim=48,
    vision_output_dim=48,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
  )
  return transformers.Llama4Config(
    text_config=TEXT_CONFIGS["llama4_scout"]().to_dict(),
    vision_config={**settings, **changes},
    image_token_index=_IMAGE,
    boi_token_index=_BEGIN,
    eoi_token_index=_END,
    pad_token_id=0,
  )


CONFIGS = {"llama4_multimodal": _llama4}
# Patches of a size like that of the embeddings that are added to them.
GAINS = {"llama4_multimodal": {"patch_embedding": 0.05}}
# Whose gradients are compared besides the routers': they come through the whole tower.
TOWER = ("class_embedding", "patch_embedding.linear.weight")


def with_images(config, inputs: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
  """Returns inputs with three images, and tokens that stand for them."""
  vision = config.vision_config
  side = int(vision.image_size // vision.patch_size * vision.pixel_shuffle_ratio)
  shape = (len(_PLACES), vision.num_channels, vision.image_size, vision.image_size)
  changed = {name: inputs[name].copy() for name in ("input_ids", "input_ids_rp")}
  for tokens in changed.values():
    for row, first in _PLACES:
      tokens[row, first : first + side**2] = config.image_token_index
  pixels = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
  return {**inputs, **changed, "pixel_values": pixels}
