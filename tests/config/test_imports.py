"""Modules that a config names are imported, once, and every fault is one sentence."""

import importlib
import runpy
import sys

import pytest

from moe_jax.config import find_in_current_folder, import_modules
from moe_jax.errors import UserError
from moe_jax.moe import RoutingConfig, register_preset, register_selection


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """The current folder of an installed command, which is not on Python's path."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
  before = set(sys.modules)
  find_in_current_folder()
  yield tmp_path
  for name in set(sys.modules) - before:
    del sys.modules[name]


ROUTER = """
from moe_jax import moe
COUNT = []
@moe.register_selection("{name}")
def select(view, config):
  COUNT.append(1)
"""


def test_a_module_of_the_current_folder_registers_its_selection(folder):
  (folder / "my_router.py").write_text(ROUTER.format(name="of_the_current_folder"))
  for _ in range(2):
    import_modules({"imports": ["my_router"], "model": 3})
  assert RoutingConfig(4, selection="of_the_current_folder").selector.chooser == "token"


def test_a_module_of_a_package_is_named_with_dots(folder):
  (folder / "routers").mkdir()
  (folder / "routers" / "mine.py").write_text(ROUTER.format(name="of_a_package"))
  import_modules({"imports": ("routers.mine",)})
  assert RoutingConfig(4, selection="of_a_package")


def test_the_current_folder_comes_last(folder):
  (folder / "colorsys.py").write_text("raise RuntimeError('not the standard library')")
  sys.modules.pop("colorsys", None)
  import_modules({"imports": ("colorsys",)})
  assert hasattr(sys.modules["colorsys"], "rgb_to_hsv")


def test_a_file_that_is_run_again_replaces_its_own_selection(folder):
  (folder / "again.py").write_text(ROUTER.format(name="run_again"))
  import_modules({"imports": ("again",)})
  module = importlib.reload(sys.modules["again"])
  assert RoutingConfig(4, selection="run_again").selector.function is module.select
  with pytest.raises(UserError, match="'run_again' is registered already"):
    register_selection("run_again")(lambda view, config: None)


def test_a_config_file_may_name_itself(folder):
  (folder / "config_of_mine.py").write_text(ROUTER.format(name="of_a_config_and_module"))
  runpy.run_path("config_of_mine.py", run_name="config_file")
  import_modules({"imports": ("config_of_mine",)})
  config = RoutingConfig(4, selection="of_a_config_and_module")
  assert config.selector.function.__module__ == "config_of_mine"


def test_a_preset_may_be_registered_again_with_the_same_values_alone():
  register_preset("registered_twice", num_experts=4, top_k=2)
  register_preset("registered_twice", num_experts=4, top_k=2)
  with pytest.raises(UserError, match="'registered_twice' exists already"):
    register_preset("registered_twice", num_experts=8, top_k=2)


@pytest.mark.parametrize(
  ("imports", "fragments"),
  [
    ("my_router", ["config.imports is 'my_router', expected a tuple"]),
    ([3], ["config.imports[0] is 3, expected a string"]),
    (["good", "my_routr"], ["config.imports[1] = 'my_routr'", "did you mean my_router?"]),
    (["my_router.py"], ["'my_router.py' is not the name of a module", "'my_router'"]),
    (["routers/mine.py"], ["'routers.mine'"]),
    ([""], ["config.imports[0] = ''"]),
    (["good.inner"], ["'good.inner': there is no such module"]),
    (["failing"], ["'failing' failed on import with ZeroDivisionError: division by zero"]),
    (["leaving"], ["'leaving' failed on import with SystemExit: 3"]),
    (["lacking"], ["'lacking' failed on import with ModuleNotFoundError: No module named 'no_one"]),
    (["taking"], ["config.imports[0] = 'taking': selection 'top_k' is registered already"]),
  ],
)
def test_a_module_that_cannot_be_imported_is_named(folder, imports, fragments):
  files = {
    "good": "",
    "my_router": "",
    "failing": "1 / 0",
    "leaving": "raise SystemExit(3)",
    "lacking": "import no_one_has_this",
    "taking": ROUTER.format(name="top_k"),
  }
  for name, text in files.items():
    (folder / f"{name}.py").write_text(text)
  with pytest.raises(UserError) as caught:
    import_modules({"imports": imports})
  for fragment in fragments:
    assert fragment in str(caught.value)
  assert "\n" not in str(caught.value)
