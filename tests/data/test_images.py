"""Images of TFDS data sets become records beside their texts."""

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data.shapes import COLOURS, Shapes, square
from PIL import Image

from moe_jax.config.load import load_config
from moe_jax.data.builders import prepare
from moe_jax.data.config import DataConfig
from moe_jax.data.images import ImageConfig, ImagePacker, fit_image, read_image, unpack_images
from moe_jax.data.packing import Piece, SpecialIds
from moe_jax.data.splits import Split
from moe_jax.errors import UserError
from moe_jax.training.config import experiment_from
from moe_jax.training.stream import training_batches

IMAGE = ImageConfig(size=2, tokens=3, token=99)
SOURCE = "tfds:shapes:1.0.0,image=image,text=label,heldout=validation"


@pytest.fixture
def shapes(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  Shapes(file_format="array_record", data_dir=str(tmp_path)).download_and_prepare()
  return tmp_path


def expected_record(text: list[int], length: int) -> dict[str, list[int]]:
  """The fields of a record by the words of the module: bos 1, eos 2, three places, padding 0."""
  stream = [1, 99, 99, 99, *text, 2]
  found = {name: [] for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask")}
  for place in range(length):
    real = place + 1 < len(stream)
    found["tokens"].append(stream[place] if real else 0)
    found["targets"].append(stream[place + 1] if real else 0)
    found["segment_ids"].append(int(real))
    found["positions"].append(place if real else 0)
    found["loss_mask"].append(int(real and stream[place + 1] != 99))
  return found


@pytest.mark.parametrize("text", [[7], [7, 8, 9], [7, 8, 9, 10]])
def test_a_record_is_bos_image_text_and_eos(text):
  packer = ImagePacker(8, SpecialIds(0, 1, 2), np.dtype("<u2"), IMAGE)
  pixels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
  payloads = packer.add([Piece(np.array(text), image=pixels)] * 2)
  rows = unpack_images(payloads, 8, 0, np.dtype("<u2"), IMAGE)
  for name, expected in expected_record(text, 8).items():
    np.testing.assert_array_equal(rows[name], [expected] * 2)
  np.testing.assert_allclose(rows["pixel_values"][1], pixels / 127.5 - 1, atol=1e-6)
  counts = packer.counts
  assert (counts.documents, counts.records, counts.target_tokens) == (2, 2, 2 * len(text) + 2)
  assert counts.padding_positions == 2 * (4 - len(text))
  assert rows["loss_mask"].sum() == counts.target_tokens


def test_a_text_without_room_is_cut_at_the_end_of_its_record():
  packer = ImagePacker(8, SpecialIds(0, 1, 2), np.dtype("<u2"), IMAGE)
  payloads = packer.add([Piece(np.arange(10, 30), image=np.zeros((3, 2, 2), np.uint8))])
  rows = unpack_images(payloads, 8, 0, np.dtype("<u2"), IMAGE)
  np.testing.assert_array_equal(rows["tokens"][0], [1, 99, 99, 99, 10, 11, 12, 13])
  np.testing.assert_array_equal(rows["targets"][0, 3:], [10, 11, 12, 13, 14])
  assert len(payloads[0]) == packer.record_bytes


def test_the_middle_square_is_kept():
  striped = np.zeros((30, 90, 3), np.uint8)
  striped[:, 30:60, 1] = 200
  for image in (striped, striped.transpose(1, 0, 2)):
    fitted = fit_image(image, ImageConfig(size=10, tokens=1, token=0))
    # Away from the edge, where the filter reaches over it.
    green = np.array([0, 200, 0])[:, None, None] * np.ones((6, 6))
    np.testing.assert_array_equal(fitted[:, 2:-2, 2:-2], green)
  grey = fit_image(np.full((5, 7, 1), 9, np.uint8), ImageConfig(4, 1, 0, channels=1))
  np.testing.assert_array_equal(grey, np.full((1, 4, 4), 9))


def test_a_data_set_of_images_is_prepared(shapes):
  image = ImageConfig(size=8, tokens=4, token=259)
  config = DataConfig(sources=(SOURCE,), sequence_length=12, image=image, data_dir=str(shapes))
  data = prepare(config, on_the_way=False)
  assert len(data.train) == 24 and len(data.heldout) == 6
  assert data.heldout_text.decode().split() == [COLOURS[i % 3] for i in range(6)]
  for index, record in enumerate([data.heldout[i] for i in range(6)]):
    text = record["targets"][record["loss_mask"] > 0]
    assert data.tokenizer.decode(text) == COLOURS[index % 3]
    pixels = fit_image(square(index % 3, index), image)
    np.testing.assert_allclose(record["pixel_values"], pixels / 127.5 - 1, atol=1e-6)
  # Again from what is there, and of another size beside it.
  assert prepare(config).fingerprint == data.fingerprint
  smaller = dict(sources=(SOURCE,), sequence_length=12, data_dir=str(shapes))
  other = DataConfig(image=ImageConfig(size=4, tokens=4, token=259), **smaller)
  assert prepare(other, on_the_way=False).fingerprint != data.fingerprint


def test_another_field_of_images_is_another_data_set(shapes):
  image = ImageConfig(size=8, tokens=4, token=259)
  fields = dict(sequence_length=12, image=image, data_dir=str(shapes))
  prepare(DataConfig(sources=(SOURCE,), **fields), on_the_way=False)
  with pytest.raises(UserError, match="has no field 'imgae'; did you mean image"):
    prepare(DataConfig(sources=(SOURCE.replace("=image", "=imgae"),), **fields), on_the_way=False)


def test_texts_that_are_cut_count_with_what_is_left_of_them(shapes):
  image = ImageConfig(size=8, tokens=4, token=259)
  config = DataConfig(sources=(SOURCE,), sequence_length=6, image=image, data_dir=str(shapes))
  data = prepare(config, on_the_way=False)
  # Two letters of each name: one is read, and the other predicted from it.
  assert data.heldout_bytes == data.heldout_targets == 2 * len(data.heldout)
  assert data.heldout_text.split() == [COLOURS[i % 3][:2].encode() for i in range(6)]
  assert data.sources[0].manifest.met.longer_than_context == 30


def test_an_image_without_a_label_is_left_out(shapes):
  source = SOURCE.replace("heldout=validation", "split=validation,heldout=unlabelled")
  image = ImageConfig(size=8, tokens=4, token=259)
  config = DataConfig(sources=(source,), sequence_length=12, image=image, data_dir=str(shapes))
  data = prepare(config, on_the_way=False)
  assert data.sources[0].manifest.met.empty_documents == 1
  assert data.counts[Split.HELDOUT].documents == 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      dict(sources=("tfds:shapes,text=label",)),
      "names no field of images, .* add the option image",
    ),
    (dict(image=None), "names a field of images, and data.image is none"),
    (dict(sources=("texts/,image=picture",)), "an option 'image' that it does not know"),
    (dict(sequence_length=5), "an image takes 4 places and bos another one; give at least 6"),
    (dict(image=dict(size=0)), "size = 0 is refused: it must be at least 1"),
    (dict(image=dict(channels=4)), "channels = 4 is refused: expected 3 "),
    (dict(sources=(SOURCE.replace("=image", "=images"),)), "has no field 'images'; did you mean"),
    (
      dict(sources=(SOURCE.replace("=image", "=label"),)),
      r"int64 of shape \(\) in field .label., expected an image",
    ),
    (dict(image=dict(token=104)), "a text holds the id 104, which data.image.token gives"),
  ],
)
def test_what_does_not_fit_is_refused(shapes, changes, message):
  fields = dict(sources=(SOURCE,), sequence_length=12, data_dir=str(shapes)) | changes
  image = dict(size=8, tokens=4, token=259) | (changes.get("image") or {})
  with pytest.raises(UserError, match=message):
    fields["image"] = None if changes.get("image", 0) is None else ImageConfig(**image)
    prepare(DataConfig(**fields), on_the_way=False)


def test_an_image_that_is_damaged_is_named(shapes, monkeypatch):
  def broken(self, example):
    raise OSError("cannot identify image file")

  monkeypatch.setattr(tfds.features.Image, "decode_example_np", broken)
  image = ImageConfig(size=8, tokens=4, token=259)
  with pytest.raises(UserError, match="split 'validation', record 1 cannot be read"):
    prepare(DataConfig(sources=(SOURCE,), sequence_length=12, image=image), on_the_way=False)


def test_a_file_is_read_as_it_is_shown(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # lies on its side
  Image.fromarray(np.zeros((4, 9, 3), np.uint8)).save(tmp_path / "side.jpg", exif=exif)
  assert read_image(tmp_path / "side.jpg").shape == (9, 4, 3)
  clear = np.zeros((2, 2, 4), np.uint8)
  Image.fromarray(clear).save(tmp_path / "clear.png")
  np.testing.assert_array_equal(read_image(tmp_path / "clear.png"), 255)
  Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "deep.png")
  with pytest.raises(UserError, match="more than 8 bits a channel"):
    read_image(tmp_path / "deep.png")


def test_a_file_that_is_no_image_is_named(tmp_path):
  path = tmp_path / "photo.jpg"
  path.write_bytes(b"no image")
  with pytest.raises(UserError, match="photo.jpg cannot be read as an image"):
    read_image(path)


@pytest.mark.parametrize("variant", ["full", "small"])
def test_the_imagenet_configs_prepare_and_give_batches(tmp_path, monkeypatch, variant):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  config = load_config(f"configs/imagenet.py:{variant}")
  config.batch_size = 4
  experiment = experiment_from(config.to_dict())
  with tfds.testing.mock_data(num_examples=6, data_dir=str(tmp_path)):
    data = prepare(experiment.data, on_the_way=False)
  batch = next(training_batches(experiment, data))
  vision, length = experiment.model.vision, experiment.data.sequence_length
  assert batch["pixel_values"].shape == (4, *vision.image_shape)
  assert batch["tokens"].shape == (4, length)
  assert (batch["tokens"] == vision.image_token).sum() == 4 * vision.tokens_per_image
  assert data.tokenizer.decode(batch["targets"][0]).startswith("n")
  assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", ["size", "tokens", "token", "channels"])
def test_images_and_the_tower_agree(name):
  config = load_config("configs/imagenet.py:small")
  config.data.image[name] = {"channels": 1, "tokens": 9, "size": 32, "token": 258}[name]
  with pytest.raises(UserError, match=rf"data.image.{name} = \d+ is refused"):
    experiment_from(config.to_dict())
  config.model.vision = None
  with pytest.raises(UserError, match="data.image is given for a model without model.vision"):
    experiment_from(config.to_dict())
