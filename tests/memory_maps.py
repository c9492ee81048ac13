"""A process's memory maps: Linux allows 65,530, every compiled program takes some."""

import gc
from pathlib import Path

import jax

_MAPS = Path("/proc/self/maps")
# Half of what Linux allows by default; beyond that XLA crashes.
_MANY = 32_000


def bound_memory_maps() -> None:
  """Drops compiled programs when their memory maps are many."""
  if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY:
    jax.clear_caches()
    gc.collect()
