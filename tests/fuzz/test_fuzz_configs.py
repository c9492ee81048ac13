"""Any config, from the command line or as a mapping, is a run's or is refused in one sentence.

A run is stopped when it would start to train: what is accepted must have a state, by its shapes.
"""

import copy
import functools
import operator
import os
import shutil
from enum import StrEnum

import pytest
from fuzz.damage import damaged_json, json_damages, places
from fuzz.judging import Counter, accepts, command_accepts, run_property
from hypothesis import strategies as st
from ml_collections import ConfigDict
from training import tiny

from moe_jax.commands import training
from moe_jax.config.load import _all_fields, load_config
from moe_jax.training.config import experiment_from
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import abstract_state

QUICKSTART = f"{tiny.ROOT}/configs/quickstart.py"
LAB = f"{tiny.ROOT}/configs/router_lab.py"
FAMILIES = sorted(
  str(path)
  for path in (tiny.ROOT / "configs").glob("*.py")
  if f"{path.name}:tiny" in path.read_text()
)
SOURCES = [QUICKSTART, f"{QUICKSTART}:dense", LAB, *(f"{path}:tiny" for path in FAMILIES)]

# Of any field: out of range, another type, no number at all.
WILD = [
  *("0", "-1", "7", "-0.1", "1e9", "1e400", "nan", "inf", "-inf", "none", "None", "true", "", " "),
  *("abc", "é", "1,2", "(1, 2)", "()", "('a',)", "(1", "{}", "1_0", "99999999999", "2147483648"),
  *("-9223372036854775809", "topk", "float33", "a\nb", "[1]", "__import__('os')"),
]
# Of a field's own type, so that fields contradict one another and not their types.
TYPED = {
  bool: ["true", "false"],
  int: ["0", "1", "2", "3", "4", "5", "8", "16", "64", "-1", "2147483647"],
  float: ["0", "0.1", "0.5", "1", "1.25", "2", "-1", "1e-6", "100", "1e300"],
  tuple: [
    *("()", "(1, 2)", "(0, 0)", "(('attention:moe', 2),)", "(('attention:dense', 1),)"),
    *("(('attention:dense attention:moe', 1), ('attention:moe', 1))", "(('mamba:moe', 1),)"),
    *("(('attention:moe', 0),)", "(('latent:moe', 2),)", "(('none:moe', 1),)", "(('x:y', 2),)"),
    *("('/nowhere/',)", "('/dev/null',)", "('c4/en:3.1.0',)", "('beginnings', 'beginnings')"),
  ],
}
AXES = ("data", "fsdp", "expert", "tensor", "sequence", "stage")
FURTHER = [
  *("--config.no_such=1", "steps=3", "--confg.steps=3", "--config.steps", "--noconfig.steps", "--"),
  *(
    "-config.steps=3",
    "--config.model=3",
    "--config.=1",
    "--config.a.b.c=1",
    "--workdr=x",
    "\ud800",
  ),
  *("--config.moe.top_k.x=1", "--replay=/nowhere", "--num_processes=2", "--process_id=0"),
]


class Started(Exception):
  """All of a run has been checked."""


def stop_at_the_start(config, data, layout, workdir, origin, begun) -> None:
  """Takes the place of training: an accepted config has a state."""
  optimizer = make_optimizer(config.optimizer, config.steps)
  abstract_state(config.model, optimizer, config.repair, layout, config.balance_placement)
  raise Started


@functools.cache
def fields_of(source: str) -> dict[str, list[str]]:
  """Maps every field of a config file to texts of its own type."""
  config = load_config(source)
  found = {}
  for name, value in sorted(_all_fields(config).items()):
    parent, _, last = name.rpartition(".")
    section = config if not parent else operator.attrgetter(parent)(config)
    if isinstance(section[last], ConfigDict):
      continue
    found[name] = TYPED.get(section.get_type(last)) or choices_like(value)
  return found


def choices_like(value: object) -> list[str]:
  """Returns the values of every enum that has this one."""
  return [str(m) for enum in enums(StrEnum) if value in list(enum) for m in enum] or WILD


def enums(kind: type) -> list[type]:
  """Lists the enums of this package that have been imported."""
  return [each for each in kind.__subclasses__() if each.__module__.startswith("moe_jax")]


def misspelt(name: str, place: float) -> str:
  """Leaves a letter out, or writes two the other way around."""
  i = int(place * len(name))
  return name[:i] + name[i + 1 :] if place < 0.5 else name[:i] + name[i + 1 : i + 2] + name[i:]


# What is set, the place of its name among the fields, and that of its value among what it may be.
KINDS = ("typed", "typed", "typed", "typed", "wild", "misspelt", "axis")
overrides = st.lists(st.tuples(st.sampled_from(KINDS), places, places), min_size=1, max_size=4)


def word(source: str, kind: str, name: float, value: float) -> str:
  """Writes one override."""
  fields = fields_of(source)
  path = list(fields)[int(name * len(fields))]
  if kind == "axis":
    path = f"sharding.{AXES[int(name * len(AXES))]}"
  texts = TYPED[int] if kind == "axis" else fields[path] if kind == "typed" else WILD
  text = texts[int(value * len(texts))]
  return f"--config.{misspelt(path, value) if kind == 'misspelt' else path}={text}"


class Runs:
  """Starts runs of configs, in a folder that must stay absent where one is refused."""

  def __init__(self, root, capsys, monkeypatch):
    self._root, self._capsys = root, capsys
    self.counter = Counter()
    monkeypatch.setattr(training, "_run", stop_at_the_start)
    monkeypatch.chdir(root)

  def check_words(self, source: str, words: list[str], further: str | None) -> None:
    """Trains from a command line."""
    workdir, before = self._root / "run", sorted(os.listdir(self._root))
    small = ["--config.data.corpus=beginnings", "--config.data.sequence_length=32"]
    place = f"--config.data.data_dir={self._root}"
    line = ["train", f"--config={source}", f"--workdir={workdir}", *small, *words, place]
    try:
      accepted = command_accepts(self._capsys, *line, *([further] if further else []))
      assert not accepted
    except Started:
      accepted = True
      shutil.rmtree(workdir)
    self.counter.count(accepted)
    # Prepared records stay, whatever becomes of the run.
    assert set(os.listdir(self._root)) - set(before) <= {"packed_text"}


def fuzz_words(runs: Runs, count: int, seed: int) -> None:
  def check(source, chosen, further):
    runs.check_words(source, [word(source, *each) for each in chosen], further)

  further = st.one_of(*[st.none()] * 6, st.sampled_from(FURTHER))
  run_property(
    check, count, seed, source=st.sampled_from(SOURCES), chosen=overrides, further=further
  )


def fuzz_mappings(counter: Counter, count: int, seed: int) -> None:
  def check(source, damages):
    mapping = damaged_json(mapping_of(source), damages)
    counter.count(accepts(lambda: start(mapping)))

  def start(mapping):
    config = experiment_from(mapping)
    optimizer = make_optimizer(config.optimizer, config.steps)
    accepted = []
    try:
      abstract_state(config.model, optimizer, config.repair, None, config.balance_placement)
      accepted.append(config)
    finally:
      assert accepted, "accepted by its config, and refused by the shapes of its state"

  run_property(check, count, seed, source=st.sampled_from(SOURCES), damages=json_damages)


@functools.cache
def _mapping(source: str) -> dict:
  return load_config(source).to_dict()


def mapping_of(source: str) -> dict:
  return copy.deepcopy(_mapping(source))


@pytest.fixture
def runs(tmp_path, capsys, monkeypatch):
  import tiny_corpus  # noqa: F401

  return Runs(tmp_path, capsys, monkeypatch)


def test_any_command_line_starts_a_run_or_is_refused(runs):
  fuzz_words(runs, count=25, seed=0)
  assert runs.counter.accepted and runs.counter.refused


def test_any_mapping_is_an_experiment_or_is_refused():
  counter = Counter()
  fuzz_mappings(counter, count=40, seed=0)
  assert counter.accepted and counter.refused


@pytest.mark.full
@pytest.mark.parametrize("part", ["command_lines", "mappings"])
def test_many_configs(part, runs, record_property):
  counter = runs.counter if part == "command_lines" else Counter()
  if part == "command_lines":
    fuzz_words(runs, count=200, seed=1)
  else:
    fuzz_mappings(counter, count=800, seed=1)
  counter.record(record_property, len(SOURCES))
