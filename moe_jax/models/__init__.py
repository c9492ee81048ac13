"""Models as segments of block patterns on one stack."""

from moe_jax.models.config import ModelConfig, Remat
from moe_jax.models.decoder import Decoder, ModelAux

__all__ = ["Decoder", "ModelAux", "ModelConfig", "Remat"]
