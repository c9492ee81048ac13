"""Models as segments of block patterns on one stack."""

import jax

from moe_jax.models.config import ModelConfig, PositionEmbedding, Remat
from moe_jax.models.decoder import Decoder
from moe_jax.models.depth_config import DepthConfig, DepthScore
from moe_jax.models.encoder import Encoded
from moe_jax.models.encoder_config import EncoderConfig
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.model_aux import ModelAux
from moe_jax.models.vision_config import VisionConfig

Model = Decoder | EncoderDecoder


def make_model(config: ModelConfig, *, key: jax.Array) -> Model:
  """Returns a new model: a decoder, or an encoder-decoder if the config has an encoder."""
  return (Decoder if config.encoder is None else EncoderDecoder)(config, key=key)


__all__ = [
  "Decoder",
  "DepthConfig",
  "DepthScore",
  "Encoded",
  "EncoderConfig",
  "EncoderDecoder",
  "Model",
  "ModelAux",
  "ModelConfig",
  "PositionEmbedding",
  "Remat",
  "VisionConfig",
  "make_model",
]
