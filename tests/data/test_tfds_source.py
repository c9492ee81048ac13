"""The real configs of TFDS data sets are read, without a network and without TensorFlow."""

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data.texts import TEXTS, decoded, example, prepared, write_tfrecord
from tensorflow_datasets.proto import tf_example_pb2

from moe_jax.config.load import load_config
from moe_jax.data import tfds_source
from moe_jax.data.builders import prepare
from moe_jax.data.config import DataConfig
from moe_jax.data.splits import Split, split_of
from moe_jax.errors import UserError
from moe_jax.training.config import experiment_from
from moe_jax.training.stream import training_batches


class Pages(tfds.core.GeneratorBasedBuilder):
  """33 documents to train on, and two to validate."""

  VERSION = tfds.core.Version("1.2.3")
  code_path = None

  def _info(self):
    features = tfds.features.FeaturesDict(
      {"text": tfds.features.Text(), "pair": tfds.features.Translation(("de", "en"))}
    )
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    del dl_manager
    return {"train": self._generate_examples(TEXTS), "validation": self._generate_examples("ab")}

  def _generate_examples(self, texts):
    for i, text in enumerate(texts):
      yield i, {"text": text, "pair": {"de": text, "en": text}}


def record_of(text):
  """Returns a record of Pages."""
  proto = tf_example_pb2.Example.FromString(example(text))
  for name in ("pair/de", "pair/en"):
    proto.features.feature[name].bytes_list.value.append(text.encode())
  return proto.SerializeToString()


@pytest.fixture
def pages(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  Pages(file_format="array_record", data_dir=str(tmp_path)).download_and_prepare()
  return tmp_path


def test_a_data_set_gives_its_documents(pages):
  source = tfds_source.open_tfds(DataConfig(sources=("tfds:pages:1.2.3",)).parts[0])
  data = prepare(DataConfig(sources=("tfds:pages",), sequence_length=16), on_the_way=False)
  assert source.size == len(TEXTS)
  assert decoded(data) == [t for i, t in enumerate(TEXTS) if split_of(i) == Split.TRAIN]


def test_a_held_out_split_is_held_out_and_nothing_else(pages):
  config = DataConfig(sources=("tfds:pages,heldout=validation",), sequence_length=16)
  data = prepare(config, on_the_way=False)
  assert decoded(data) == list(TEXTS) and decoded(data, Split.HELDOUT) == ["a", "b"]


def test_tfrecord_files_are_read_too(pages, tmp_path, monkeypatch):
  # As written by TFDS with TensorFlow: the same directory with files of another format.
  (folder,) = pages.glob("pages/*")
  info = (folder / "dataset_info.json").read_text()
  (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
  for split, texts in (("train", TEXTS), ("validation", "ab")):
    path = folder / f"pages-{split}.tfrecord-00000-of-00001"
    write_tfrecord(path, map(record_of, texts))
  data = prepare(
    DataConfig(sources=("tfds:pages,heldout=validation",), sequence_length=16), on_the_way=False
  )
  assert decoded(data) == list(TEXTS)
  with pytest.raises(UserError, match=r"of which split 'train\[:5\]' cannot be cut"):
    prepare(DataConfig(sources=("tfds:pages,split=train[:5]",)), on_the_way=False)


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("tfds:pages,text=txt", "record 1 has no field 'txt'; did you mean text"),
    ("tfds:pages,text=pair", "has dict in field 'pair', expected text"),
    ("tfds:pages,split=trian", "has no split 'trian'; did you mean train"),
    ("tfds:page", "TFDS has no data set 'page'; did you mean pages"),
    ("tfds:c4/english", "source tfds:c4/english is refused by TFDS"),
    ("tfds:c4/en:9.9.9", "is refused by TFDS"),
    ("tfds:c4/en:3.1.0", "c4/en/3.1.0 is not in .*; write it with tfds build c4/en/3.1.0"),
    ("tfds:wmt14_translate/de-en,text=en", "wmt14_translate/de-en/1.0.0 is not in"),
  ],
)
def test_what_is_not_there_is_named_with_what_mends_it(pages, source, message):
  with pytest.raises(UserError, match=message):
    prepare(DataConfig(sources=(source,)), on_the_way=False)


def test_data_sets_are_not_prepared_on_the_way(pages):
  with pytest.raises(UserError, match="run moe-jax data prepare"):
    prepared("tfds:pages", pages)


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("tfds:imagenet2012", "has no field 'text'; expected one of file_name, image, label"),
    ("tfds:imagenet2012,text=image", r"has an array of shape \(\d+, \d+, 3\) .*images .* not read"),
  ],
)
def test_a_data_set_of_images_is_refused(tmp_path, monkeypatch, source, message):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  with (
    tfds.testing.mock_data(num_examples=20, data_dir=str(tmp_path)),
    pytest.raises(UserError, match=message),
  ):
    prepare(DataConfig(sources=(source,)), on_the_way=False)


@pytest.mark.parametrize("variant", ["web", "mixture"])
def test_the_c4_configs_prepare_and_give_batches(tmp_path, monkeypatch, variant):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  config = load_config(f"configs/c4.py:{variant}")
  config.batch_size, config.data.sequence_length = 4, 8
  config.data.data_dir = str(tmp_path)
  experiment = experiment_from(config.to_dict())
  with tfds.testing.mock_data(num_examples=40, data_dir=str(tmp_path)):
    data = prepare(experiment.data, on_the_way=False)
  batch = next(training_batches(experiment, data))
  assert {(v.shape, v.dtype) for v in batch.values()} == {((4, 8), np.dtype(np.int32))}
  assert len(data.sources) == len(experiment.data.sources)
  assert "tensorflow" not in sys.modules
