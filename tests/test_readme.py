"""Every command and every Python block of the README runs, on the tiny sizes of the tests."""

import re
import shlex
import sys

import pytest
from distributed.tiny_processes import several_processes
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from moe_jax.cli import main
from moe_jax.errors import UserError
from moe_jax.moe import RoutingConfig, presets, registry
from moe_jax.training.run_folder import claim_run

README = (tiny.ROOT / "README.md").read_text()
MAKEFILE = (tiny.ROOT / "Makefile").read_text()


def blocks(language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
# These tests have eight devices anyway. Lines of several processes run in tests/distributed.
EIGHT = "JAX_NUM_CPU_DEVICES=8 "
HERE = [line.removeprefix(EIGHT) for line in COMMANDS]
MOE_JAX = [shlex.split(line)[1:] for line in HERE if line.startswith("moe-jax ")]


def test_commands_are_of_known_kinds():
  assert len(MOE_JAX) >= 6
  for line in HERE:
    if line not in several_processes():
      assert line.split()[0] in ("make", "moe-jax", "python"), line


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(line):
  assert re.search(rf"^{line.split()[1]}:", MAKEFILE, flags=re.M)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python -m ")])
def test_modules_exist(line):
  module = line.split()[2].replace(".", "/")
  assert (tiny.ROOT / f"{module}.py").is_file()


def test_make_train_runs_the_quickstart():
  assert "--config=configs/quickstart.py --workdir=runs/quickstart" in MAKEFILE


@pytest.fixture
def my_router(tmp_path, monkeypatch):
  """Puts the module of the README on Python's path; returns what makes a process forget it."""
  (code,) = [block for block in blocks("python") if "register_selection" in block]
  (tmp_path / "modules").mkdir()
  (tmp_path / "modules" / "my_router.py").write_text(code)
  monkeypatch.syspath_prepend(tmp_path / "modules")

  def forget():
    sys.modules.pop("my_router", None)
    registry._SELECTORS.pop("least_likely", None)
    presets._PRESETS.pop("contrarian", None)

  yield forget
  forget()


def small_run(workdir, variant: str) -> list[str]:
  """Returns the words that train two steps of two equal blocks."""
  segments = ((f"attention:{variant}", 2),)
  return tiny.command(workdir, variant, steps=2, model__segments=segments, model__scan_unroll=1)


def test_moe_jax_commands_run_in_the_order_of_the_readme(tmp_path, monkeypatch, my_router):
  # Runs land in a scratch folder; configs are found from the repository.
  monkeypatch.chdir(tiny.ROOT)
  assert main(small_run(tmp_path / "quickstart", "moe")) == 0
  for words in MOE_JAX:
    words = [word.replace("=runs/", f"={tmp_path}/") for word in words]
    if words[0] == "convert":
      words = [re.sub(r"steps=\d+", "steps=3", word) for word in words]
    # A run that was made from another one brings a config of that one's size.
    if words[0] == "train" and words[1].startswith("--config=configs/"):
      variant = "dense" if any(":dense" in word for word in words) else "moe"
      # The tiny sizes first, so that what the README sets itself wins.
      words = words[:1] + small_run("x", variant)[3:] + words[1:]
    if any(word.startswith("--config.sharding.") for word in words):
      words.append("--config.batch_size=8")
    elif words[0] == "generate":
      words.append("--max_new_tokens=4")
    # Each command is a process of its own to its user.
    my_router()
    assert main(words) == 0, words


def test_a_run_whose_router_is_not_found_is_refused_in_one_sentence(tmp_path, capsys):
  mapping = tiny.mapping() | {"imports": ["my_router"]}
  mapping["moe"]["selection"] = "least_likely"
  with claim_run(tmp_path, mapping):
    pass
  for command in (["eval"], ["trace", "--out=x.npz"], ["generate", "--prompt=a"]):
    assert main([*command, f"--workdir={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert "config.json: config.imports[0] = 'my_router': there is no such module" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code):
  exec(compile(code, "README.md", "exec"), {})


def test_linked_files_exist():
  for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
    assert (tiny.ROOT / target).exists(), target


def test_no_placeholder_is_left():
  for path in (tiny.ROOT / "README.md", tiny.ROOT / "experiments/quickstart/README.md"):
    assert not re.search(r"RESULTS(?!\.md)", path.read_text())


REFUSED = re.search(r"sense are refused.*?\n\n(.*?)\n\n", README, flags=re.S)[1].splitlines()[2:]


@pytest.mark.parametrize("row", REFUSED)
def test_combinations_of_the_table_are_refused(row):
  fields = dict(pair.split("=") for pair in row.split("`")[1].split(", "))
  fields = {name: int(v) if v.isdigit() else v for name, v in fields.items()}
  fields = {name: float(v) if name.endswith("weight") else v for name, v in fields.items()}
  RoutingConfig(num_experts=4, top_k=2)
  with pytest.raises(UserError):
    RoutingConfig(**{"num_experts": 4, "top_k": 2, **fields})
