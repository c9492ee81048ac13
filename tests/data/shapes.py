"""A TFDS data set of images: squares of three colours, named."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

COLOURS = ("red", "green", "blue")


def square(colour: int, seed: int) -> np.ndarray:
  """Returns a noisy square of one colour, (rows, columns, 3) uint8, of a size of its own."""
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 60, (12 + seed % 3, 14, 3)).astype(np.uint8)
  image[..., colour] += 150
  return image


class Shapes(tfds.core.GeneratorBasedBuilder):
  """24 images to train on, 6 to validate, and two of which one has no label."""

  VERSION = tfds.core.Version("1.0.0")
  code_path = None

  def _info(self):
    features = tfds.features.FeaturesDict(
      {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=COLOURS)}
    )
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    del dl_manager
    sizes = {"validation": 6, "train": 24, "unlabelled": 2}
    return {split: self._generate_examples(split, size) for split, size in sizes.items()}

  def _generate_examples(self, split, size):
    first = 100 if split == "train" else 0
    for i in range(size):
      label = -1 if split == "unlabelled" and i else i % 3
      file = io.BytesIO()
      Image.fromarray(square(i % 3, first + i)).save(file, "PNG")
      yield i, {"image": file.getvalue(), "label": label}
