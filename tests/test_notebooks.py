"""Every notebook runs from its first cell to its last, and is committed without outputs."""

import json
import re

import jax
import pytest
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

NOTEBOOKS = sorted((tiny.ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
  cells = json.loads(path.read_text())["cells"]
  return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_are_notebooks():
  assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
  namespace = {}
  # A reader's JAX has its defaults, not the strict ranks of the tests.
  with jax.numpy_rank_promotion("allow"):
    for cell in code_cells(path):
      exec(compile("".join(cell["source"]), path.name, "exec"), namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_holds_no_outputs(path):
  assert all(cell["outputs"] == [] for cell in code_cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_checks_what_it_tells(path):
  sources = ["".join(cell["source"]) for cell in code_cells(path)]
  assert any(re.search(r"^\s*assert ", source, flags=re.M) for source in sources)
