"""A fixture for tests whose time is XLA's: tiny programs, compiled once and run once."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
  """Compiles a module's programs without most optimisations, in half the time."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
