"""Models as segments of block patterns on one stack."""

from moe_jax.models.config import ModelConfig, Remat
from moe_jax.models.decoder import Decoder, ModelAux
from moe_jax.models.depth_config import DepthConfig, DepthScore

__all__ = ["Decoder", "DepthConfig", "DepthScore", "ModelAux", "ModelConfig", "Remat"]
