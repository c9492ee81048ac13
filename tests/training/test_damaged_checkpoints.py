"""Damage to a checkpoint is always found and named, and the sound step before it is taken."""

import random
import shutil
import time

import pytest
from training.saved import DATA, assert_same, drawn, files_of, save_steps, template

from moe_jax.errors import UserError
from moe_jax.training import checkpoint, orbax_store
from moe_jax.training.checkpoint import Checkpoints, DamagedCheckpoint, restore_whole
from moe_jax.training.config import CheckpointConfig
from moe_jax.training.manifest import HASH_FILE, MANIFEST_FILE
from moe_jax.training.step_folders import saved_steps

SOUND, HURT = 2, 4
MANIFEST = {MANIFEST_FILE, HASH_FILE}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("saved") / "run"
  save_steps(workdir, (SOUND, HURT))
  return workdir


@pytest.fixture
def run(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "run")


class Run:
  """A run's checkpoints, and the lines that were said of them."""

  def __init__(self, workdir):
    self.said = []
    self.checkpoints = Checkpoints(workdir, CheckpointConfig(), say=self.said.append)
    self.hurt = self.checkpoints.folder / str(HURT)

  def assert_falls_back(self, *names: str) -> None:
    """The hurt step is refused by name, and the walk back ends at the sound one."""
    with pytest.raises(DamagedCheckpoint, match=str(self.hurt)) as refusal:
      self.checkpoints.restore(HURT, template())
    assert any(name in refusal.value.reason for name in names), refusal.value.reason
    self.said.clear()
    step, state, data = self.checkpoints.restore_latest(template())
    assert step == SOUND and data == DATA | {"step": SOUND}
    assert_same(state, drawn(SOUND))
    (line,) = self.said
    assert str(self.hurt) in line and refusal.value.reason in line


def flip(path, rng: random.Random) -> None:
  """Flips one to eight bits of one byte."""
  content = bytearray(path.read_bytes())
  content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
  path.write_bytes(content)


def names_of(path, folder) -> set[str]:
  """What a refusal may name: both parts of the manifest vouch for each other."""
  name = path.relative_to(folder).as_posix()
  return MANIFEST if name in MANIFEST else {name}


def assert_flips_are_found(run: Run, count: int, seed: int) -> None:
  rng = random.Random(seed)
  files = files_of(run.hurt)
  # A byte is hit as often in a large file as in a small one.
  weights = [path.stat().st_size for path in files]
  for path in rng.choices(files, weights, k=count // 2) + rng.choices(files, k=count - count // 2):
    before = path.read_bytes()
    flip(path, rng)
    run.assert_falls_back(*names_of(path, run.hurt))
    path.write_bytes(before)
  assert run.checkpoints.restore(HURT, template())[1] == DATA | {"step": HURT}


def test_what_is_sound_comes_back_as_it_was(run):
  opened = Run(run)
  step, state, data = opened.checkpoints.restore_latest(template())
  assert step == HURT and data == DATA | {"step": HURT} and not opened.said
  assert_same(state, drawn(HURT))


def test_flipped_bytes_are_found(run):
  assert_flips_are_found(Run(run), count=16, seed=0)


@pytest.mark.full
@pytest.mark.parametrize("seed", [f"flips{part}" for part in range(5)])
def test_five_hundred_flipped_bytes_are_found(run, seed, record_property):
  started = time.process_time()
  assert_flips_are_found(Run(run), count=100, seed=int(seed[-1]) + 1)
  record_property("configs", 1)
  record_property("inputs", 100)
  record_property("cpu_seconds", time.process_time() - started)


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_cut_and_lost_files_are_found(run, kept):
  """Every file, cut to nothing, to a half, or by its last byte; then lost."""
  opened = Run(run)
  for path in files_of(opened.hurt):
    content = path.read_bytes()
    path.write_bytes(content[: min(int(kept * len(content)), len(content) - 1)])
    with pytest.raises(DamagedCheckpoint) as refusal:
      opened.checkpoints.restore(HURT, template())
    assert any(name in refusal.value.reason for name in names_of(path, opened.hurt))
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match="is missing") as refusal:
      opened.checkpoints.restore(HURT, template())
    assert path.name in refusal.value.reason
    path.write_bytes(content)
  opened.checkpoints.restore(HURT, template())


@pytest.mark.parametrize("kind", ["empty folder", "file", "lost manifest", "step of another name"])
def test_what_is_no_step_any_more_is_passed_over(run, kind):
  opened = Run(run)
  if kind == "lost manifest":
    for name in MANIFEST:
      (opened.hurt / name).unlink()
  else:
    shutil.rmtree(opened.hurt)
  if kind == "empty folder":
    opened.hurt.mkdir()
  elif kind == "file":
    opened.hurt.write_text("mine")
  elif kind == "step of another name":
    shutil.copytree(opened.hurt.with_name(str(SOUND)), opened.hurt)
  opened.assert_falls_back(MANIFEST_FILE)


def test_wrong_values_in_sound_files_are_found(run, monkeypatch):
  """As if orbax, or the memory on the way, had made other numbers of what is on disk."""
  opened, wrong = Run(run), drawn(7)
  monkeypatch.setattr(checkpoint, "read_items", lambda folder, template: (wrong, DATA))
  with pytest.raises(DamagedCheckpoint, match="the values of .* are not those that were saved"):
    opened.checkpoints.restore(HURT, template())


def test_without_any_sound_step_nothing_is_restored_and_nothing_touched(run):
  opened = Run(run)
  for step in (SOUND, HURT):
    flip(opened.hurt.with_name(str(step)) / MANIFEST_FILE, random.Random(step))
  before = [path.read_bytes() for path in files_of(run)]
  with pytest.raises(UserError, match="no checkpoint in .* is sound .step 4: .*; step 2: "):
    opened.checkpoints.restore_latest(template())
  assert [path.read_bytes() for path in files_of(run)] == before


def test_an_empty_folder_of_checkpoints_is_the_start_of_a_run(tmp_path):
  assert Run(tmp_path).checkpoints.restore_latest(template()) is None


def test_readers_of_a_run_check_it_too(run):
  said = []
  (path, *_) = files_of(run / "checkpoints" / str(HURT) / "state" / "d")
  flip(path, random.Random(0))
  state, data = restore_whole(run, template(), say=said.append)
  assert data["step"] == SOUND and len(said) == 1
  assert_same(state, drawn(SOUND))
  with pytest.raises(DamagedCheckpoint, match=path.name):
    restore_whole(run, template(), step=HURT)
  with pytest.raises(UserError, match="has no step 5; the nearest is 4"):
    restore_whole(run, template(), step=5)


def test_steps_that_cannot_be_read_as_a_number_are_none(run):
  folder = run / "checkpoints"
  for name in ("04", "4a", "x", "-1", "4.removed"):
    (folder / name).mkdir()
  assert saved_steps(folder) == [SOUND, HURT]


def test_orbax_alone_would_have_restored_some_flipped_bytes(run):
  """Why this exists: the numbers of at least one file may change without a word."""
  folder = run / "checkpoints" / str(HURT)
  path = max(files_of(folder / "state"), key=lambda path: path.stat().st_size)
  content, silent = path.read_bytes(), 0
  for place in range(100, len(content), len(content) // 8):
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    try:
      orbax_store.read_items(folder, template())
      silent += 1
    except UserError:
      continue
  assert silent
