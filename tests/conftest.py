"""Settings that every test runs under: eight CPU devices, no silent broadcast between ranks."""

import os
import shutil
import tempfile
from pathlib import Path

# Read by JAX when it is first imported, so it must stand before every import of it. Workers and
# the processes that tests start inherit all of it: a program that one of them has compiled, the
# others load, which saves a quarter of the time.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if _OWN_CACHE:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="moe_jax_tests_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# Most of a test's time is XLA's. Without the emitters of fused loops, and in one module in place of
# one for each of many threads, it takes half of it; what the programs compute stays the same.
_FASTER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{_FASTER} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from full_report import FullReport  # noqa: E402
from memory_maps import bound_memory_maps  # noqa: E402

# (E,) + (G, S, E) is more often a forgotten axis than an intention.
jax.config.update("jax_numpy_rank_promotion", "raise")
# A mesh for the tests that ask for one; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
  """Adds the option by which `make test-full` writes its summary."""
  help = "folder in which FULL.md and full_results.json say what the tests marked `full` found"
  parser.addoption("--full-report", metavar="FOLDER", help=help)


def pytest_configure(config):
  """Starts the summary, in the one process that sees the results of all workers."""
  folder = config.getoption("--full-report")
  if folder and not hasattr(config, "workerinput"):
    config.pluginmanager.register(FullReport(Path(folder)))


def pytest_unconfigure():
  """Removes the compiled programs, in the process that made their folder."""
  if _OWN_CACHE:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def bounded_executables():
  """Drops compiled programs between modules when their memory maps are many."""
  yield
  bound_memory_maps()
