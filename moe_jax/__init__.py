"""Mixture-of-Experts in JAX: routers, layers, models, training and analysis."""

__version__ = "0.1.0"
