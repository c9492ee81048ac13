"""Every command and every Python block of the README runs, on the tiny sizes of the tests."""

import re
import shlex

import pytest
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from moe_jax.cli import main
from moe_jax.errors import UserError
from moe_jax.moe import RoutingConfig

README = (tiny.ROOT / "README.md").read_text()
MAKEFILE = (tiny.ROOT / "Makefile").read_text()


def blocks(language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
MOE_JAX = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("moe-jax ")]


def test_commands_are_of_known_kinds():
  assert len(MOE_JAX) >= 6
  for line in COMMANDS:
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


def test_moe_jax_commands_run_in_the_order_of_the_readme(tmp_path, monkeypatch):
  # Runs land in a scratch folder; configs are found from the repository.
  monkeypatch.chdir(tiny.ROOT)
  quick = tiny.command(tmp_path / "quickstart", steps=2)
  assert main(quick) == 0
  small = {False: tiny.command("x", "dense", steps=2)[3:], True: tiny.command("x", steps=2)[3:]}
  for words in MOE_JAX:
    words = [word.replace("=runs/", f"={tmp_path}/") for word in words]
    if words[0] == "train":
      is_moe = not any(":dense" in word for word in words)
      # The tiny sizes first, so that what the README sets itself wins.
      words = words[:1] + small[is_moe] + words[1:]
    elif words[0] == "generate":
      words.append("--max_new_tokens=4")
    assert main(words) == 0, words


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code):
  exec(compile(code, "README.md", "exec"), {})


def test_linked_files_exist():
  for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
    assert (tiny.ROOT / target).exists(), target


def test_no_placeholder_is_left():
  for path in (tiny.ROOT / "README.md", tiny.ROOT / "experiments/quickstart/README.md"):
    assert "RESULTS" not in path.read_text()


REFUSED = re.search(r"sense are refused.*?\n\n(.*?)\n\n", README, flags=re.S)[1].splitlines()[2:]


@pytest.mark.parametrize("row", REFUSED)
def test_combinations_of_the_table_are_refused(row):
  fields = dict(pair.split("=") for pair in row.split("`")[1].split(", "))
  fields = {name: int(v) if v.isdigit() else v for name, v in fields.items()}
  fields = {name: float(v) if name.endswith("weight") else v for name, v in fields.items()}
  RoutingConfig(num_experts=4, top_k=2)
  with pytest.raises(UserError):
    RoutingConfig(**{"num_experts": 4, "top_k": 2, **fields})
