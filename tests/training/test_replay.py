"""A run says where it was made, and `moe-jax train --replay` trains it again, bit for bit."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from moe_jax import provenance
from moe_jax.cli import main
from moe_jax.commands import summary
from moe_jax.errors import UserError
from moe_jax.provenance import package_versions, source_commit
from moe_jax.training.origin import Origin, differences, read_origins, record_origin
from moe_jax.training.run_folder import read_config
from moe_jax.training.saved_run import load_state

# The smallest run with random numbers in it; `test_resume` has them in every place.
RUN = dict(
  variant="dense",
  steps=4,
  eval__every=4,
  model__segments=(("attention:dense", 1),),
  model__scan_unroll=1,
  model__dropout=0.1,
)
WALL_CLOCK = {"tokens_per_second"}


@pytest.fixture(scope="module", autouse=True)
def no_compressor():
  """It takes five seconds, and has nothing to do with replays."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(summary, "xz_primed_bits_per_byte", lambda text, primer: 0.0)
    yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "run"
  assert main(tiny.command(workdir, **RUN)) == 0
  return workdir


def rows(workdir) -> list[dict]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in lines]


def with_origin(run, folder, **changes):
  """A folder with the run's config, and its origin changed."""
  folder.mkdir()
  (folder / "config.json").write_bytes((run / "config.json").read_bytes())
  content = json.loads((run / "origin.json").read_text())
  content["origins"][0] |= changes
  (folder / "origin.json").write_text(json.dumps(content))
  return folder


def test_a_run_records_its_origin(run):
  (origin,) = read_origins(run)
  assert origin.commit == source_commit()
  assert origin.devices == jax.device_count() and origin.processes == 1
  assert origin.packages["jax"] == jax.__version__
  assert re.fullmatch("[0-9a-f]{64}", origin.data)


def test_a_replay_equals_the_run_bit_for_bit(run, tmp_path, capsys):
  new = tmp_path / "new"
  assert main(["train", f"--replay={run}", f"--workdir={new}"]) == 0
  assert "replaying" not in capsys.readouterr().out
  assert len(rows(run)) == 4 and rows(new) == rows(run)
  assert read_config(new) == read_config(run)
  jax.tree.map(np.testing.assert_array_equal, load_state(new)[1], load_state(run)[1])


def test_a_replay_of_other_data_is_refused_and_nothing_written(run, tmp_path, capsys):
  other = with_origin(run, tmp_path / "other", data="0" * 64)
  assert main(["train", f"--replay={other}", f"--workdir={tmp_path / 'new'}"]) == 2
  message = capsys.readouterr().err
  assert "trained on data of fingerprint 000000000000" in message and message.count("\n") == 1
  assert not (tmp_path / "new").exists()


def test_what_else_differs_is_said_in_a_line_each():
  here = Origin("abc", {"jax": "0.10.2", "numpy": "2"}, "cpu", 8, 1, "f")
  there = Origin("abc-dirty", {"jax": "0.10.1", "scipy": "1"}, "cpu", 4, 1, "f")
  assert differences(there, here) == [
    "commit: abc-dirty there, abc here",
    "devices: 4 there, 8 here",
    "jax: 0.10.1 there, 0.10.2 here",
    "numpy: absent there, 2 here",
    "scipy: 1 there, absent here",
  ]
  assert not differences(here, here)


def test_only_another_origin_is_added(tmp_path):
  first, second = (Origin("a", {}, "cpu", devices, 1, "f") for devices in (1, 8))
  for origin in (first, first, second, second):
    record_origin(tmp_path, origin)
  assert read_origins(tmp_path) == [first, second]


@pytest.mark.parametrize("content", ["{", "[]", '{"origins": [{"commit": 1}]}', '{"origins": 3}'])
def test_a_damaged_origin_is_named(tmp_path, content):
  (tmp_path / "origin.json").write_text(content)
  with pytest.raises(UserError, match="origin.json is damaged .* delete that file"):
    read_origins(tmp_path)


@pytest.mark.parametrize(
  "words, fragment",
  [
    (["--replay={run}", "--workdir={run}"], "is the --workdir itself"),
    (["--replay={run}", "--workdir=x", "--config=a.py"], "takes --config or --replay, and both"),
    (["--replay={run}", "--workdir=x", "--config.steps=3"], "and --config=FILE was not given"),
    (["--replay=nowhere", "--workdir=x"], "nowhere holds no config.json"),
  ],
)
def test_a_replay_that_makes_no_sense_is_refused(run, capsys, words, fragment):
  assert main(["train", *(word.format(run=run) for word in words)]) == 2
  message = capsys.readouterr().err
  assert fragment in message and message.count("\n") == 1


def test_versions_are_those_of_the_lock_and_of_all_that_is_asked_for():
  lock = (tiny.ROOT / "requirements.lock").read_text()
  locked = {provenance._canonical(name) for name in re.findall("^([^#=\n]+)==", lock, flags=re.M)}
  found = package_versions()
  assert found.keys() - {"python"} <= locked
  asked = re.search(r"_REQUIREMENTS = \[(.*?)\]", Path(tiny.ROOT / "setup.py").read_text(), re.S)[1]
  names = re.findall(r'f?"([A-Za-z_-]+)', asked)
  assert names and {provenance._canonical(name) for name in names} <= found.keys()
