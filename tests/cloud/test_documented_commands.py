"""The commands of the READMEs are ones that the launchers take."""

import re
import shlex

import pytest
from cloud.stand_in import ROOT

from experiments.cloud import gke, slurm, tpu

MAINS = {
  f"experiments.cloud.{module.__name__.split('.')[-1]}": module for module in (tpu, gke, slurm)
}
CLOUD = (ROOT / "experiments/cloud/README.md").read_text()
PAGES = CLOUD + (ROOT / "README.md").read_text()
LINES = [line for line in PAGES.splitlines() if line.startswith("python -m experiments.cloud.")]


@pytest.fixture
def settings(tmp_path, monkeypatch):
  (text,) = re.findall(r"```toml\n(.*?)```", CLOUD, flags=re.S)
  (tmp_path / "run.toml").write_text(text)
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("line", LINES)
def test_documented_command_is_taken(line, settings, capsys):
  _, _, module, *words = shlex.split(line)
  # Behind `--` stand the words of the training.
  cut = words.index("--") if "--" in words else len(words)
  words = [*words[:cut], "--dry-run", *words[cut:]]
  assert MAINS[module].main(words) == 0
  assert capsys.readouterr().out


def test_all_launchers_are_documented():
  assert len(LINES) >= 6
  assert {line.split()[2] for line in LINES} == set(MAINS)


def test_every_verb_of_the_slices_is_in_the_table():
  for verb in tpu._VERBS:
    assert f"\n| `{verb}` |" in CLOUD
