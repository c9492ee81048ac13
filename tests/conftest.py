"""Settings that every test runs under: CPU, and no silent broadcast between ranks."""

import os
from pathlib import Path

# Read by JAX when it is first imported, so it must stand before every import of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402
from full_report import FullReport  # noqa: E402
from memory_maps import bound_memory_maps  # noqa: E402

# (E,) + (G, S, E) is more often a forgotten axis than an intention.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
  """Adds the option by which `make test-full` writes its summary."""
  help = "folder in which FULL.md and full_results.json say what the tests marked `full` found"
  parser.addoption("--full-report", metavar="FOLDER", help=help)


def pytest_configure(config):
  """Starts the summary, in the one process that sees the results of all workers."""
  folder = config.getoption("--full-report")
  if folder and not hasattr(config, "workerinput"):
    config.pluginmanager.register(FullReport(Path(folder)))


@pytest.fixture(autouse=True, scope="module")
def bounded_executables():
  """Drops compiled programs between modules when their memory maps are many."""
  yield
  bound_memory_maps()
