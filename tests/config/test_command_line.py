"""Command lines against a small config file: good ones, and a table of bad ones."""

import os
import subprocess
import sys

import pytest

from moe_jax import cli
from moe_jax.config.command_line import parse_command_line
from moe_jax.errors import UserError

CONFIG = """
from ml_collections import config_dict
from moe_jax.errors import UserError

def get_config(variant="small"):
  if variant == "broken":
    return {}["absent"]
  if variant not in ("small", "large"):
    raise UserError(f"variant {variant!r} is not one of small, large")
  config = config_dict.ConfigDict()
  config.steps = 100
  config.name = "a"
  config.debug = False
  config.untyped = None
  config.names = ["a"]
  config.moe = config_dict.ConfigDict({"num_experts": 8, "top_k": 2, "capacity_factor": 1.25})
  config.moe.capacity = config_dict.placeholder(int)
  config.moe.hidden = config.moe.get_ref("num_experts") * 4
  config.mesh = config_dict.ConfigDict({"shape": (1, 2)})
  config.width = 64 if variant == "small" else 512
"""

TRAIN = cli.COMMANDS["train"].flags


@pytest.fixture(autouse=True)
def _project_with_configs(tmp_path, monkeypatch):
  """Works in a folder with a few config files, as a user does at the project's root."""
  files = {
    "quickstart": CONFIG + "  return config",
    "mixtral": CONFIG + "  return config",
    "plain": "def get_config():\n  from ml_collections import ConfigDict\n  return ConfigDict()",
    "demanding": "def get_config(variant):\n  return None",
    "unset": CONFIG + "  config.seed = config_dict.required_placeholder(int)\n  return config",
    "empty": "",
    "wrong": "def get_config():\n  return 3",
    "syntax": "def get_config(:",
    "crash": "import a_module_that_does_not_exist",
    "leaves": "raise SystemExit(0)",
    "quits": "def get_config():\n  raise SystemExit",
  }
  (tmp_path / "configs").mkdir()
  for name, text in files.items():
    (tmp_path / "configs" / f"{name}.py").write_text(text)
  monkeypatch.chdir(tmp_path)


def _train(*words):
  """Parses a train command line that is complete but for `words`."""
  required = ["--config=configs/quickstart.py", "--workdir=runs/a"]
  return parse_command_line([*required, *words], flags=TRAIN, program="moe-jax train")


def test_config_and_workdir_are_returned():
  args = _train()
  assert (args.workdir, args.config_source) == ("runs/a", "configs/quickstart.py")
  assert args.config.moe.num_experts == 8


def test_a_switch_needs_no_value():
  plan = cli.COMMANDS["plan"].flags
  for words, value in (([], False), (["--json"], True), (["--json=false"], False)):
    args = parse_command_line([*words, "--config=configs/quickstart.py"], flags=plan)
    assert args.json is value


def test_variant_after_the_colon_reaches_get_config():
  assert _train().config.width == 64
  assert _train("--config=configs/quickstart.py:large").config.width == 512


@pytest.mark.parametrize(
  ("words", "field", "value"),
  [
    (["--config.steps=3"], "steps", 3),
    (["--config.steps", "3"], "steps", 3),
    (["--config.steps", "-3"], "steps", -3),
    (["--config.steps=3", "--config.steps=4"], "steps", 4),
    (["--config.name=b=c"], "name", "b=c"),
    (["--config.name="], "name", ""),
    (["--config.name=none"], "name", "none"),
    (["--config.debug"], "debug", True),
    (["--config.debug", "--config.steps=1"], "debug", True),
    (["--config.debug=true"], "debug", True),
    (["--config.debug", "true"], "debug", True),
    (["--config.debug", "--noconfig.debug"], "debug", False),
    (["--config.moe.capacity_factor=2"], "moe.capacity_factor", 2.0),
    (["--config.moe.capacity=5"], "moe.capacity", 5),
    (["--config.moe.capacity=5", "--config.moe.capacity=none"], "moe.capacity", None),
    (["--config.moe.num_experts=16"], "moe.hidden", 64),
    (["--config.mesh.shape=(3,4)"], "mesh.shape", (3, 4)),
    (["--config.mesh.shape=3,4"], "mesh.shape", (3, 4)),
    (["--config.mesh.shape=(3,4)", "--config.mesh.shape=(5,)"], "mesh.shape", (5,)),
  ],
)
def test_override_sets_a_field_in_its_own_type(words, field, value):
  config = _train(*words).config
  for part in field.split("."):
    config = config[part]
  assert config == value and type(config) is type(value)


def test_override_may_come_before_the_config():
  words = ["--config.steps=3", "--workdir", "w", "--config", "configs/quickstart.py"]
  assert parse_command_line(words, flags=TRAIN).config.steps == 3


def test_parsing_twice_starts_afresh():
  _train("--config.steps=3")
  assert _train().config.steps == 100


def test_defaults_and_types_of_plain_flags():
  flags = cli.COMMANDS["generate"].flags
  args = parse_command_line(["--workdir=a", "--prompt", "--- it was", "--seed=7"], flags=flags)
  assert vars(args) == {
    "workdir": "a",
    "prompt": "--- it was",
    "checkpoint": None,
    "dtype": None,
    "max_new_tokens": 200,
    "temperature": 0.8,
    "top_k": None,
    "top_p": None,
    "seed": 7,
    "image": None,
  }


def test_repeated_flag_of_folders_keeps_every_value_in_order():
  flags = cli.COMMANDS["report"].flags
  args = parse_command_line(["--workdir=a", "--compare=c", "--compare", "b"], flags=flags)
  assert args.compare == ("c", "b")


@pytest.mark.parametrize(
  ("words", "fragments"),
  [
    (
      ["--config.moe.num_expert=4"],
      ["--config.moe.num_expert=4", "did you mean --config.moe.num_experts?"],
    ),
    (["--config.num_experts=4"], ["did you mean --config.moe.num_experts?"]),
    (["--config.mo.top_k=1"], ["did you mean --config.moe.top_k?"]),
    (["--config.steps.x=1"], ["no field steps.x"]),
    (["--config.qqqqq=1"], ["no field qqqqq", "moe", "steps"]),
    (["--config.=1"], ["no field"]),
    (["--config.stepz"], ["did you mean --config.steps?"]),
    (["--config.steps=abc"], ["--config.steps=abc", "not an int"]),
    (["--config.steps=1.5"], ["--config.steps=1.5", "not an int"]),
    (["--config.steps=1e3"], ["not an int"]),
    (["--config.steps="], ["not an int"]),
    (["--config.steps"], ["--config.steps needs a value"]),
    (["--config.moe.capacity=x"], ["not an int"]),
    (["--config.moe.capacity_factor=x"], ["not a number"]),
    (["--config.debug=maybe"], ["not true or false"]),
    (["--noconfig.debug=true"], ["--noconfig.debug=true", "use --config.debug=true"]),
    (["--config.moe={}"], ["moe is a section", "--config.moe."]),
    (["--config.untyped=1"], ["untyped", "placeholder"]),
    (["--config.names=[1]"], ["names is a list", "tuple"]),
    (["--workdr=x"], ["--workdr", "did you mean --workdir?"]),
    (["-workdir=x"], ["'-workdir=x'", "did you mean --workdir=x?"]),
    (["--confg.steps=3"], ["--confg.steps", "did you mean --config.steps?"]),
    (["config.steps=3"], ["'config.steps=3'", "did you mean --config.steps=3?"]),
    (["workdir=b"], ["did you mean --workdir=b?"]),
    (["stray"], ["'stray'", "--name=value"]),
    (["--"], ["--"]),
    (["--workdir"], ["--workdir needs a value"]),
    (["--workdir="], ["--workdir= is empty"]),
    (["--config="], ["--config= is empty"]),
    (["--config=missing.py"], ["no file missing.py", "configs/quickstart.py"]),
    (["--config=configs/mixtrl.py"], ["did you mean configs/mixtral.py?"]),
    (["--config=quickstart"], ["did you mean configs/quickstart.py?"]),
    (["--config=configs"], ["no file configs"]),
    (
      ["--config=configs/mixtral.py:huge"],
      ["configs/mixtral.py:huge", "variant 'huge' is not one of small, large"],
    ),
    (["--config=configs/mixtral.py:broken"], ["mixtral.py:broken", "KeyError: 'absent'"]),
    (["--config=configs/plain.py:big"], ["takes no variant", "--config=configs/plain.py"]),
    (["--config=configs/demanding.py"], ["needs a variant", "configs/demanding.py:VARIANT"]),
    (["--config=configs/demanding.py:a"], ["returned NoneType"]),
    (["--config=configs/unset.py"], ["configs/unset.py uses required_placeholder"]),
    (["--config=configs/empty.py"], ["configs/empty.py", "get_config()"]),
    (["--config=configs/wrong.py"], ["returned int"]),
    (["--config=configs/syntax.py"], ["configs/syntax.py failed with SyntaxError"]),
    (["--config=configs/leaves.py"], ["configs/leaves.py failed with SystemExit: 0"]),
    (["--config=configs/quits.py"], ["configs/quits.py failed with SystemExit"]),
    (["--config.name=\udcff"], ["--config.name=\\udcff", "UTF-8"]),
    (["--config=configs/crash.py"], ["configs/crash.py", "a_module_that_does_not_exist"]),
  ],
)
def test_bad_command_line_names_the_fault_and_the_nearest_choice(words, fragments):
  with pytest.raises(UserError) as caught:
    _train(*words)
  for fragment in fragments:
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
  ("argv", "fragments"),
  [
    (["train"], ["moe-jax train needs --config=FILE[:VARIANT]"]),
    (["train", "--config=configs/quickstart.py"], ["moe-jax train needs --workdir=DIR"]),
    (["trian"], ["'trian' is not a command; did you mean train?"]),
    (["zzz"], ["expected one of train, eval, trace, generate, convert, checkpoint"]),
    (["--config=configs/quickstart.py"], ["is not a command"]),
    (["eval", "--workdir=a", "--config.steps=1"], ["--config.steps is no flag of moe-jax eval"]),
    (["eval", "--workdir=a", "--step=1.5"], ["--step=1.5", "not an int"]),
    (["generate", "--workdir=a", "--prompt=b", "--temperature=hot"], ["'hot' is not a number"]),
    (["generate", "--workdir=a", "--prompt=two", "words"], ["'words'", "quote"]),
    (["generate", "--workdir=a"], ["needs --prompt=TEXT"]),
    (["generate", "--workdir=a", "--prompt=\udcff"], ["--prompt=\\udcff", "UTF-8"]),
    (["generate", "--workdir=a", "--prompt=b", "--seed=-1"], ["--seed=-1", "0 to 4294967295"]),
    (["audit", "--preset=switch", "--seed=4294967296"], ["--seed=4294967296", "0 to 4294967295"]),
    (["conventions", "--sample=x"], ["'x' is not an int from 0"]),
    (["train", f"--config={'x' * 300}.py", "--workdir=a"], ["xxx.py", "name too long"]),
    (["train", "--config=configs/plain.py/a.py", "--workdir=a"], ["configs/plain.py/a.py"]),
  ],
)
def test_fault_is_one_line_on_stderr_and_status_2(argv, fragments, capsys):
  assert cli.main(argv) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("moe-jax: error: ") and err.count("\n") == 1
  for fragment in fragments:
    assert fragment in err


def test_no_command_shows_the_help_with_status_2(capsys):
  assert cli.main([]) == 2
  assert "commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
  "argv", [["--help"], ["-h"], *([*name.split(), "--help"] for name in cli.COMMANDS)]
)
def test_help_lists_every_choice_in_short_lines_with_status_0(argv, capsys):
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  name = " ".join(argv[:-1])
  flags = cli.COMMANDS[name].flags if name in cli.COMMANDS else ()
  expected = [f"  --{flag.name}" for flag in flags] or [f"  {name} " for name in cli.COMMANDS]
  assert all(choice in out for choice in expected)
  assert max(map(len, out.splitlines())) <= 100


def test_version_is_the_packages(capsys):
  assert cli.main(["--version"]) == 0
  assert capsys.readouterr().out.split() == ["moe-jax", cli.__version__]


def _stand_in(monkeypatch, function):
  """Runs `function` in place of the work of `moe-jax eval`."""
  monkeypatch.setattr(cli.pkgutil, "resolve_name", lambda entry: function)
  return cli.main(["eval", "--workdir=a"])


def test_command_receives_its_arguments_and_its_status_is_returned(monkeypatch):
  seen = []
  assert _stand_in(monkeypatch, seen.append) == 0
  assert vars(seen[0]) == {"workdir": "a", "step": None, "arm": (), "replay": None}
  assert _stand_in(monkeypatch, lambda args: 3) == 3


def test_user_error_from_a_command_is_one_line(monkeypatch, capsys):
  def fail(args):
    raise UserError("there is no run\nin a")

  assert _stand_in(monkeypatch, fail) == 2
  assert capsys.readouterr().err == "moe-jax: error: there is no run in a\n"


def test_interrupt_is_one_line_and_status_130(monkeypatch, capsys):
  def interrupt(args):
    raise KeyboardInterrupt

  assert _stand_in(monkeypatch, interrupt) == 130
  assert capsys.readouterr().err.strip() == "moe-jax: interrupted"


def test_a_file_that_cannot_be_read_is_one_line_with_path_and_reason(monkeypatch, capsys):
  assert _stand_in(monkeypatch, lambda args: open("configs")) == 2
  error = capsys.readouterr().err
  assert error.startswith("moe-jax: error: configs cannot be read or written (Is a directory)")
  assert error.count("\n") == 1


def test_a_file_that_cannot_be_replaced_is_named_by_its_own_name(tmp_path, monkeypatch, capsys):
  (tmp_path / "new.tmp").touch()
  assert _stand_in(monkeypatch, lambda args: os.replace("new.tmp", "configs")) == 2
  assert capsys.readouterr().err.startswith("moe-jax: error: configs cannot be")


def test_a_fault_of_the_system_without_a_file_keeps_its_traceback(monkeypatch):
  def bug(args):
    raise OSError("no file of the user's")

  with pytest.raises(OSError, match="no file"):
    _stand_in(monkeypatch, bug)


def test_a_terminal_that_cannot_show_a_character_shows_another(tmp_path, monkeypatch):
  with open(tmp_path / "out", "w", encoding="ascii") as terminal:
    monkeypatch.setattr(sys, "stdout", terminal)
    assert _stand_in(monkeypatch, lambda args: print("\N{EURO SIGN}")) == 0
  assert (tmp_path / "out").read_text() == "?\n"


def test_any_other_exception_keeps_its_traceback(monkeypatch):
  def bug(args):
    raise ValueError("a bug")

  with pytest.raises(ValueError, match="a bug"):
    _stand_in(monkeypatch, bug)


def test_help_imports_neither_jax_nor_ml_collections():
  code = (
    "import sys; from moe_jax import cli; cli.main(['--help']); "
    "sys.exit(bool({'jax', 'flax', 'numpy', 'ml_collections'} & set(sys.modules)))"
  )
  root = str(__import__("pathlib").Path(cli.__file__).parents[1])
  subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=root)


@pytest.mark.parametrize(
  "target, status, words",
  [("closed pipe", 141, ""), ("/dev/full", 2, "the output cannot be written (No space left")],
)
def test_an_output_that_takes_nothing_ends_without_a_traceback(target, status, words):
  if target == "/dev/full":
    out = os.open(target, os.O_WRONLY)
  else:
    reader, out = os.pipe()
    os.close(reader)
  command = [sys.executable, "-m", "moe_jax.cli", "--help"]
  root = os.path.dirname(os.path.dirname(cli.__file__))
  done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, cwd=root)
  os.close(out)
  assert done.returncode == status
  assert words in done.stderr and done.stderr.count("\n") == bool(words)
