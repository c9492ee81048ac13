"""Images: the tower's operations against loops, its tokens in the text, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from oracles import vision as oracle
from tiny_models import random_parameters, tiny_config

from moe_jax.errors import UserError
from moe_jax.inference import generate
from moe_jax.layers.attention_config import RotaryLayout
from moe_jax.layers.rotary import apply_rotary
from moe_jax.models import VisionConfig
from moe_jax.models.vision import (
  cut_patches,
  image_places,
  patch_rotary_table,
  pixel_shuffle,
  place_images,
)

IMAGE = 12
VISION = VisionConfig(
  image_token=IMAGE,
  model_dim=16,
  num_layers=1,
  num_heads=2,
  hidden_dim=24,
  adapter_dim=12,
  image_size=8,
  patch_size=2,
  num_channels=3,
)
# Row 0 has two images of four tokens, row 1 has one.
TOKENS = np.array(
  [
    [3, *[IMAGE] * 4, 4, *[IMAGE] * 4, 5, 6],
    [7, 8, *[IMAGE] * 4, 9, 1, 2, 3, 4, 5],
  ],
  np.int32,
)


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


PIXELS = jnp.asarray(draw(3, *VISION.image_shape), jnp.float32)


MASK = np.ones(TOKENS.shape, bool)


@pytest.fixture(scope="module")
def model():
  """A decoder with a tower, whose experts take every token."""
  return nnx.merge(*random_parameters(dataclasses.replace(tiny_config(), vision=VISION)))


@pytest.fixture(scope="module")
def run(model):
  """Returns the model's logits, compiled once: (tokens, mask, images) to (2, 12, 13)."""
  return jax.jit(lambda tokens, mask, pixels: model(tokens, token_mask=mask, pixel_values=pixels))


def test_patches_are_cut_row_by_row():
  images = draw(2, 3, 8, 8)
  mine = cut_patches(jnp.asarray(images, jnp.float32), 2)
  expected = np.stack([oracle.patches(image, 2) for image in images])
  np.testing.assert_array_equal(mine, expected.astype(np.float32))


def test_rotation_is_by_columns_and_rows_and_leaves_the_class_token():
  side, x = VISION.patches_per_side, draw(17, 2, 8)
  table = patch_rotary_table(VISION)
  mine = apply_rotary(jnp.asarray(x, jnp.float32)[None], table, RotaryLayout.PAIRS)[0]
  # Angles up to 4 in float32: 1e-6.
  np.testing.assert_allclose(mine, oracle.rotated(x, side, VISION.rope_theta), atol=3e-6)
  np.testing.assert_array_equal(mine[-1], x[-1].astype(np.float32))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pixel_shuffle_joins_squares(size):
  x = draw(2, 36, 5)
  expected = np.stack([oracle.shuffled(each, size) for each in x])
  np.testing.assert_array_equal(
    pixel_shuffle(jnp.asarray(x, jnp.float32), size), expected.astype(np.float32)
  )


def test_tokens_of_images_take_the_places_of_image_tokens_in_order():
  x, images = draw(2, 12, 5), draw(3, 4, 5, seed=1)
  config = dataclasses.replace(tiny_config(), vision=VISION)
  places = image_places(config, jnp.asarray(TOKENS), jnp.asarray(MASK), PIXELS)
  np.testing.assert_array_equal(places, TOKENS == IMAGE)
  mine = place_images(jnp.asarray(x, jnp.float32), places, jnp.asarray(images, jnp.float32))
  x[0, 1:5], x[0, 6:10], x[1, 2:6] = images
  np.testing.assert_array_equal(mine, x.astype(np.float32))


def test_tokens_of_images_can_be_named_by_a_mask():
  config = dataclasses.replace(tiny_config(), vision=VISION)
  named = jnp.asarray(TOKENS == IMAGE)
  tokens, mask = jnp.full(TOKENS.shape, 2, jnp.int32), jnp.asarray(MASK)
  assert image_places(config, tokens, mask, PIXELS, named) is named


def test_an_image_is_seen_by_the_tokens_from_it_on_in_its_row_alone(run):
  first, second = (run(TOKENS, MASK, each) for each in (PIXELS, PIXELS.at[1].add(1.0)))
  moved = np.max(np.abs(first - second), axis=-1) > 1e-4
  assert moved[0, 6:].all()
  assert not moved[0, :6].any() and not moved[1].any()


def test_padding_is_no_image_token(run):
  padded, real = TOKENS.copy(), MASK.copy()
  padded[:, 10:], real[:, 10:] = IMAGE, False
  logits, expected = run(padded, real, PIXELS), run(TOKENS, MASK, PIXELS)
  # The same sums in another order: float32.
  np.testing.assert_allclose(logits[:, :10], expected[:, :10], atol=1e-5)


def test_another_number_of_image_tokens_is_one_sentence_or_nan(model, run):
  tokens = jnp.asarray(TOKENS)
  for call in (model, lambda *given, **named: generate(model, *given, 2, **named)):
    with pytest.raises(UserError, match=r"12 image tokens \(id 12\); expected 8, 4 for each of 2"):
      call(tokens, pixel_values=PIXELS[:2])
  for column in (0, 1):
    wrong = TOKENS.copy()
    wrong[0, column] = IMAGE if column == 0 else 2
    assert np.isnan(run(wrong, MASK, PIXELS)).all()


def test_images_that_do_not_fit_are_refused(model):
  text_model = nnx.merge(*random_parameters(tiny_config()))
  tokens = jnp.asarray(TOKENS)
  for wrong in (PIXELS[:, :, :4], PIXELS[0], PIXELS.astype(jnp.int32)):
    with pytest.raises(UserError, match=re.escape("expected (images, 3, 8, 8) floats")):
      model(tokens, pixel_values=wrong)
  with pytest.raises(UserError, match="image_mask has shape"):
    model(tokens, pixel_values=PIXELS, image_mask=jnp.ones((2, 3), bool))
  with pytest.raises(UserError, match="image_mask was given without pixel_values"):
    model(tokens, image_mask=jnp.asarray(TOKENS == IMAGE))
  for call in (text_model, lambda *given, **named: generate(text_model, *given, 2, **named)):
    with pytest.raises(UserError, match="no vision section"):
      call(tokens, pixel_values=PIXELS)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(num_heads=3), "4 \\* num_heads must divide model_dim"),
    (dict(image_size=10), "image_size = 10 is refused.* for example 8"),
    (dict(num_layers=0), "num_layers = 0 is refused"),
    (dict(rope_theta=0.0), "rope_theta = 0.0 is refused"),
  ],
)
def test_towers_that_cannot_be_are_refused(changes, words):
  with pytest.raises(UserError, match=words):
    dataclasses.replace(VISION, **changes)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(vision=dataclasses.replace(VISION, image_token=13)), "from 0 to 12"),
    (dict(vision=VISION, mtp_depth=1), "vision is refused with mtp_depth = 1"),
  ],
)
def test_models_that_cannot_read_images_are_refused(changes, words):
  with pytest.raises(UserError, match=words):
    dataclasses.replace(tiny_config(), **changes)


def test_generation_with_images_is_the_same_with_and_without_a_cache(model):
  tokens = jnp.asarray(TOKENS)
  cached, uncached = (
    generate(model, tokens, 2, pixel_values=PIXELS, use_cache=use) for use in (True, False)
  )
  np.testing.assert_array_equal(cached, uncached)
  assert cached.shape == (2, 14)
