"""A run on images, by its commands: prepared, trained, evaluated, shown an image of its own."""

import json

import pytest
from data.shapes import COLOURS, Shapes, square
from fast_compilation import compile_fast  # noqa: F401
from PIL import Image
from training import tiny

from moe_jax.cli import main

SIZES = {
  "steps": 60,
  "batch_size": 8,
  "data.sources": ("tfds:shapes:1.0.0,image=image,text=label,heldout=validation",),
  "data.sequence_length": 12,
  "data.image.size": 8,
  "data.image.tokens": 4,
  "model.model_dim": 16,
  "model.segments": (("attention:dense attention:moe", 1),),
  "model.num_heads": 2,
  "model.num_kv_heads": 2,
  "model.head_dim": 8,
  "model.mlp.hidden_dim": 32,
  "model.vision.model_dim": 16,
  "model.vision.num_layers": 1,
  "model.vision.hidden_dim": 32,
  "model.vision.adapter_dim": 16,
  "model.vision.image_size": 8,
  "model.vision.patch_size": 2,
  "moe.hidden_dim": 32,
  "moe.num_experts": 4,
  "optimizer.learning_rate": 1e-2,
  "optimizer.warmup_steps": 4,
  # Of 6 held-out images the last two share their batch with padding.
  "eval.batch_size": 4,
  "eval.every": 60,
  "checkpoint.every": 30,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(folder))
    Shapes(file_format="array_record", data_dir=str(folder)).download_and_prepare()
    config = f"--config={tiny.ROOT}/configs/imagenet.py:small"
    words = [config, *(f"--config.{name}={value}" for name, value in SIZES.items())]
    assert main(["data", "prepare", *words]) == 0
    assert main(["train", *words, f"--workdir={folder / 'run'}"]) == 0
    yield folder / "run"


def test_it_learns_to_name_what_it_is_shown(run, capsys):
  summary = json.loads((run / "summary.json").read_text())
  assert summary["eval"]["accuracy"] == 1.0
  assert summary["sample"] | {"temperature": 0.0} == summary["sample"]
  assert summary["sample"]["prompt"] == "[held-out image of red] "
  assert summary["sample"]["text"] == "red"
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert rows[-1]["eval_accuracy"] == 1.0
  assert main(["eval", f"--workdir={run}"]) == 0
  assert "100.00 % of images right" in capsys.readouterr().out


@pytest.mark.parametrize("colour", range(3))
def test_a_file_of_an_image_is_named(run, tmp_path, capsys, colour):
  Image.fromarray(square(colour, 77)).save(tmp_path / "photo.png")
  words = ["generate", f"--workdir={run}", "--prompt=", "--temperature=0", "--max_new_tokens=8"]
  assert main([*words, f"--image={tmp_path / 'photo.png'}"]) == 0
  assert capsys.readouterr().out.strip() == COLOURS[colour]


def test_what_cannot_go_with_images_is_refused(run, tmp_path, capsys):
  assert main(["trace", f"--workdir={run}", f"--out={tmp_path / 'trace.npz'}"]) == 2
  assert "traces are of text alone" in capsys.readouterr().err
  words = ["generate", f"--workdir={run}", "--prompt=", "--image=none.png"]
  assert main(words) == 2
  assert "none.png cannot be read as an image" in capsys.readouterr().err
