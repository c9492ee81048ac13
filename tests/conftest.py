"""What every test shares: the CPU, and no silent broadcasting between ranks."""

import os

# Before jax is imported: afterwards the platform is settled.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
