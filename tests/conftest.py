"""Settings that every test runs under: CPU, and no silent broadcast between ranks."""

import os

# Read by JAX when it is first imported, so it must stand before every import of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

# (E,) + (G, S, E) is more often a forgotten axis than an intention.
jax.config.update("jax_numpy_rank_promotion", "raise")
