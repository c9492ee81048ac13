"""Mixture-of-Experts in JAX: routers, layers, models, training and analysis."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Loaded on first use: the command line answers `--help` without importing JAX.
_LAZY = {
  "convert": None,
  "generate": "moe_jax.inference",
  "load_pretrained": "moe_jax.convert",
  "moe": None,
  "save_pretrained": "moe_jax.convert",
}


def __getattr__(name: str) -> Any:
  if name not in _LAZY:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  home = _LAZY[name]
  return (
    importlib.import_module(f"{__name__}.{name}")
    if home is None
    else getattr(importlib.import_module(home), name)
  )
