"""Images: the tower's operations against loops, its tokens in the text, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from oracles import vision as oracle
from tiny_models import tiny_config

from moe_jax.errors import UserError
from moe_jax.inference import generate
from moe_jax.layers.attention_config import RotaryLayout
from moe_jax.layers.rotary import apply_rotary
from moe_jax.models import VisionConfig, make_model
from moe_jax.models.vision import cut_patches, patch_rotary_table, pixel_shuffle

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


@pytest.fixture(scope="module")
def model():
  """A decoder with a tower, whose experts take every token."""
  config = dataclasses.replace(tiny_config().dropless(), vision=VISION)
  return make_model(config, key=jax.random.key(0))


@pytest.fixture(scope="module")
def text_model():
  return make_model(tiny_config().dropless(), key=jax.random.key(0))


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


def test_tokens_of_images_take_the_places_of_image_tokens_in_order(model, text_model):
  images = np.asarray(model.vision(PIXELS))
  assert images.shape == (3, VISION.tokens_per_image, 8)
  seen = []

  def spy(x, *rest, **named):
    seen.append(x)
    return type(model).run(model, x, *rest, **named)

  model.run = spy
  try:
    model(jnp.asarray(TOKENS), pixel_values=PIXELS)
  finally:
    del model.run
  x = np.asarray(seen[0])
  np.testing.assert_allclose(x[0, 1:5], images[0], atol=1e-6)
  np.testing.assert_allclose(x[0, 6:10], images[1], atol=1e-6)
  np.testing.assert_allclose(x[1, 2:6], images[2], atol=1e-6)
  words = TOKENS != IMAGE
  np.testing.assert_array_equal(x[words], np.asarray(model.embedding[...])[TOKENS[words]])


def test_an_image_is_seen_by_the_tokens_after_it_in_its_row_alone(model):
  changed = PIXELS.at[1].add(1.0)
  first, second = (model(jnp.asarray(TOKENS), pixel_values=each) for each in (PIXELS, changed))
  moved = np.max(np.abs(first - second), axis=-1) > 1e-4
  assert moved[0, 6:].all()
  assert not moved[0, :6].any() and not moved[1].any()


def test_tokens_of_images_can_be_named_by_a_mask(model):
  mask = jnp.asarray(TOKENS == IMAGE)
  other = jnp.where(mask, 2, jnp.asarray(TOKENS))
  named = model(other, pixel_values=PIXELS, image_mask=mask)
  # No router here reads ids.
  np.testing.assert_array_equal(named, model(jnp.asarray(TOKENS), pixel_values=PIXELS))


def test_padding_is_no_image_token(model):
  padded = np.concatenate([TOKENS, np.full((2, 3), IMAGE, np.int32)], axis=1)
  real = np.arange(15)[None] < np.array([[12], [12]])
  logits = model(jnp.asarray(padded), token_mask=jnp.asarray(real), pixel_values=PIXELS)
  expected = model(jnp.asarray(TOKENS), pixel_values=PIXELS)
  # Sums of another length: float32.
  np.testing.assert_allclose(logits[:, :12], expected, atol=1e-5)


def test_another_number_of_image_tokens_is_one_sentence_or_nan(model):
  tokens = jnp.asarray(TOKENS)
  with pytest.raises(UserError, match=r"12 image tokens \(id 12\); expected 8, 4 for each of 2"):
    model(tokens, pixel_values=PIXELS[:2])
  with pytest.raises(UserError, match="12 image tokens"):
    generate(model, tokens, 2, pixel_values=PIXELS[:2])
  traced = jax.jit(lambda tokens: model(tokens, pixel_values=PIXELS[:2]))(tokens)
  assert np.isnan(traced).all()


def test_images_that_do_not_fit_are_refused(model, text_model):
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
    generate(model, tokens, 4, pixel_values=PIXELS, use_cache=use) for use in (True, False)
  )
  np.testing.assert_array_equal(cached, uncached)
  assert cached.shape == (2, 16)
