"""A damaged checkpoint of the hub is converted, or refused in one sentence; never half.

Converting reads everything and writes everything: the new folder is whole and can be read, or is
not there.
"""

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from fuzz.damage import damage_files, damaged_json, file_damages, json_damages, places
from fuzz.judging import Counter, command_accepts, contents, run_property
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from training import tiny

from moe_jax import load_pretrained, save_pretrained
from moe_jax.config.load import load_config
from moe_jax.models import make_model
from moe_jax.training.config import model_from

FEW = ("mixtral", "deepseek", "gpt_oss")
ALL = (
  *("dbrx", "deepseek", "glm4_moe", "gpt_oss", "granite_moe", "jamba", "llama4", "mixtral"),
  *("nllb_moe", "olmoe", "phi_moe", "qwen_moe", "switch"),
)
TENSOR_KINDS = ("drop", "rename", "shape", "type", "extra", "empty", "float16", "nan")
tensor_damages = st.lists(st.tuples(st.sampled_from(TENSOR_KINDS), places), min_size=1, max_size=3)
# The settings, the tensors, or any file of the folder.
damages = st.one_of(
  st.tuples(st.just("settings"), json_damages),
  st.tuples(st.just("settings"), json_damages),
  st.tuples(st.just("tensors"), tensor_damages),
  st.tuples(st.just("files"), file_damages),
)


@functools.cache
def _saved(family: str, root: Path) -> Path:
  """Saves the tiny variant of a family, in several files and with an index."""
  config = model_from(load_config(f"{tiny.ROOT}/configs/{family}.py:tiny").to_dict())
  config = dataclasses.replace(config.dropless(), mtp_depth=0)
  graph, shapes = nnx.split(nnx.eval_shape(lambda: make_model(config, key=jax.random.key(0))))
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda a: jax.numpy.asarray(rng.normal(size=a.shape), a.dtype), shapes)
  folder = root / family
  whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(state))
  save_pretrained(nnx.merge(graph, state), config, folder, max_file_bytes=whole // 2)
  for name, content in {"generation_config.json": {"eos_token_id": 2}, "notes.json": {}}.items():
    (folder / name).write_text(json.dumps(content))
  return folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
  root = tmp_path_factory.mktemp("pristine")
  return lambda family: _saved(family, root)


def damage_tensors(folder: Path, damages: list[tuple[str, float]]) -> None:
  """Changes tensors of one of the files, and writes it as a sound one."""
  for kind, place in damages:
    paths = sorted(folder.glob("*.safetensors"))
    path = paths[int(place * len(paths))]
    tensors = dict(load_file(path))
    if not tensors:
      continue
    key = sorted(tensors)[int(place * len(tensors))]
    tensor = tensors[key]
    changed = {
      "rename": {key + ".old": tensor},
      "shape": {key: np.ascontiguousarray(tensor[..., :-1])},
      "type": {key: tensor.astype(np.int32)},
      "extra": {key: tensor, "model.extra": np.zeros(3, np.float32)},
      "empty": {key: tensor[:0]},
      "float16": {key: tensor.astype(np.float16)},
      "nan": {key: np.full_like(tensor, np.nan)},
    }
    del tensors[key]
    save_file(tensors | changed.get(kind, {}), path)


def damage(folder: Path, kind: str, damages: list) -> None:
  if kind == "settings":
    path = folder / "config.json"
    path.write_text(json.dumps(damaged_json(json.loads(path.read_text()), damages)))
  elif kind == "tensors":
    damage_tensors(folder, damages)
  else:
    damage_files(folder, damages)


class Folders:
  """Converts damaged folders, each in a place of its own."""

  def __init__(self, root: Path, pristine, capsys):
    self._root, self._pristine, self._capsys = root, pristine, capsys
    self.counter = Counter()

  def check(self, family: str, kind: str, damages: list) -> None:
    case = Path(tempfile.mkdtemp(dir=self._root))
    source, out = shutil.copytree(self._pristine(family), case / "in"), case / "out"
    damage(source, kind, damages)
    before = contents(source)
    accepted = command_accepts(self._capsys, "convert", f"--checkpoint={source}", f"--out={out}")
    self.counter.count(accepted)
    assert contents(source) == before
    assert sorted(os.listdir(case)) == ["in", "out"][: 1 + accepted]
    if accepted:
      load_pretrained(out)
    shutil.rmtree(case)


def fuzz(folders: Folders, families: tuple[str, ...], count: int, seed: int) -> None:
  def check(family, damage):
    folders.check(family, *damage)

  run_property(check, count, seed, family=st.sampled_from(families), damage=damages)


def test_damaged_checkpoints_are_converted_or_refused(tmp_path, pristine, capsys):
  folders = Folders(tmp_path, pristine, capsys)
  fuzz(folders, FEW, count=30, seed=0)
  assert folders.counter.accepted and folders.counter.refused


@pytest.mark.full
@pytest.mark.parametrize("part", ["first", "second"])
def test_many_checkpoints(tmp_path, pristine, capsys, part, record_property):
  folders = Folders(tmp_path, pristine, capsys)
  families = ALL[:6] if part == "first" else ALL[6:]
  fuzz(folders, families, count=200, seed=1)
  folders.counter.record(record_property, len(families))
