"""Generation with a key-value cache."""

from moe_jax.inference.generate import generate

__all__ = ["generate"]
