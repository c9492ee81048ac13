"""Settings that every test runs under: CPU, and no silent broadcast between ranks."""

import gc
import os
from pathlib import Path

# Read by JAX when it is first imported, so it must stand before every import of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

# (E,) + (G, S, E) is more often a forgotten axis than an intention.
jax.config.update("jax_numpy_rank_promotion", "raise")

_MAPS = Path("/proc/self/maps")
# Half of what Linux allows a process by default; beyond that XLA crashes.
_MANY_MAPS = 32_000


@pytest.fixture(autouse=True, scope="module")
def bounded_executables():
  """Drops compiled programs between modules when their memory maps are many."""
  yield
  if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
    jax.clear_caches()
    gc.collect()
