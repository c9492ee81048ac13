"""Damaged and arbitrary folders of text are prepared, or refused in one sentence; never half."""

import shutil
import tempfile
from pathlib import Path

import pytest
from data.texts import TEXTS, WRITERS, decoded, json_lines, prepared
from fuzz.damage import byte_damages, damaged_bytes
from fuzz.judging import Counter, accepts, contents, run_property
from hypothesis import strategies as st

from moe_jax.data.builders import verify
from moe_jax.data.config import DataConfig

SUFFIXES = (
  *(".txt", ".txt.gz", ".jsonl", ".json.xz", ".parquet", ".tfrecord", ".array_record", ".md"),
)
contents_of_files = st.one_of(st.just(b""), st.binary(max_size=300), st.just(json_lines(TEXTS)))
plain_files = st.tuples(st.just(".txt"), contents_of_files)
any_files = st.tuples(st.sampled_from(SUFFIXES), contents_of_files)
sound_files = st.tuples(st.sampled_from([".jsonl", ".txt", ".md"]), st.just(json_lines(TEXTS)))
folders_of_files = st.one_of(
  st.lists(any_files, max_size=20),
  # Enough documents to hold some out, which few folders of anything have.
  st.lists(plain_files, min_size=17, max_size=24),
  st.lists(sound_files | plain_files, min_size=1, max_size=5),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  """Every format's file of the same texts, by its name."""
  folder = tmp_path_factory.mktemp("sound")
  for name, write in WRITERS.items():
    write(folder / name, TEXTS)
  return contents(folder)


class Folders:
  """Prepares folders, each in a place of its own."""

  def __init__(self, root: Path):
    self._root, self.counter = root, Counter()

  def check(self, files: dict[str, bytes]) -> None:
    """Prepares a folder of some files: what comes out verifies, or nothing does."""
    case = Path(tempfile.mkdtemp(dir=self._root))
    (case / "in").mkdir()
    for name, content in files.items():
      (case / "in" / name).write_bytes(content)
    before = contents(case / "in")
    accepted = accepts(lambda: self._prepare(case))
    self.counter.count(accepted)
    assert contents(case / "in") == before
    assert accepted or not list(case.glob("packed_text/*/manifest.json"))
    shutil.rmtree(case)

  @staticmethod
  def _prepare(case: Path) -> None:
    source = f"{case / 'in'}/"
    data = prepared(source, case)
    verify(DataConfig(sources=(source,), sequence_length=16, data_dir=str(case)))
    assert len(decoded(data)) == data.counts["train"].documents


def fuzz_damaged(folders: Folders, sound: dict[str, bytes], count: int, seed: int) -> None:
  def check(name, damages):
    folders.check({name: damaged_bytes(sound[name], damages)})

  run_property(check, count, seed, name=st.sampled_from(sorted(sound)), damages=byte_damages)


def fuzz_anything(folders: Folders, count: int, seed: int) -> None:
  def check(files):
    folders.check({f"{i}{suffix}": content for i, (suffix, content) in enumerate(files)})

  run_property(check, count, seed, files=folders_of_files)


def test_damaged_files_are_read_or_refused(tmp_path, sound):
  folders = Folders(tmp_path)
  fuzz_damaged(folders, sound, count=60, seed=0)
  assert folders.counter.accepted and folders.counter.refused


def test_folders_of_anything_are_read_or_refused(tmp_path):
  folders = Folders(tmp_path)
  fuzz_anything(folders, count=40, seed=0)
  assert folders.counter.accepted and folders.counter.refused


@pytest.mark.full
@pytest.mark.parametrize("part", ["damaged", "anything"])
def test_many_folders(tmp_path, sound, part, record_property):
  folders = Folders(tmp_path)
  if part == "damaged":
    fuzz_damaged(folders, sound, count=400, seed=1)
  else:
    fuzz_anything(folders, count=250, seed=1)
  folders.counter.record(record_property, len(WRITERS) if part == "damaged" else 1)
