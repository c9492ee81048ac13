"""Checkpoints of the Hugging Face hub, read and written."""

from moe_jax.convert.loading import load_pretrained
from moe_jax.convert.saving import save_pretrained, to_hub

__all__ = ["load_pretrained", "save_pretrained", "to_hub"]
