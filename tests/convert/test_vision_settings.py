"""Settings of vision towers mean what they mean to the original's code, or are refused."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from convert.conftest import config_of

from moe_jax.convert.families import architecture_settings, family_of
from moe_jax.errors import UserError

FOLDER = Path(__file__).parent.parent / "parity" / "fixtures" / "llama4_multimodal"


def read(top=None, text=None, **vision):
  """Returns the config of the fixture with some settings changed, and None ones taken away."""
  settings = json.loads((FOLDER / "config.json").read_text())
  settings |= top or {}
  settings["text_config"] |= text or {}
  settings["vision_config"] |= vision
  tower = settings["vision_config"]
  settings["vision_config"] = {name: value for name, value in tower.items() if value is not None}
  return config_of(settings)


def test_settings_written_are_those_read():
  config = read(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
  assert config.vision.rope_theta == 500.0
  family = family_of(config)
  assert family.architecture == "Llama4ForConditionalGeneration"
  assert config_of(architecture_settings(family, config)) == config
  text = dataclasses.replace(config, vision=None)
  assert family_of(text).architecture == "Llama4ForCausalLM"


def test_settings_of_the_release():
  # Its file has the rotary base beside the sizes, and layers that no code reads.
  vision = read(
    rope_parameters=None,
    rope_theta=10_000,
    vision_feature_layer=-1,
    hidden_size=1408,
    num_attention_heads=16,
    num_hidden_layers=34,
    intermediate_size=5632,
    image_size=336,
    projector_input_dim=4096,
    projector_output_dim=4096,
    vision_output_dim=4096,
    top={"image_token_index": 92},
  ).vision
  assert vision == type(vision)(image_token=92)
  assert vision.tokens_per_image == 144


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(hidden_act="relu"), 'hidden_act = "relu"'),
    (dict(norm_eps=1e-6), "norm_eps = 1e-06"),
    (dict(multi_modal_projector_bias=True), "multi_modal_projector_bias = true"),
    (dict(vision_feature_select_strategy="full"), 'vision_feature_select_strategy = "full"'),
    (dict(pixel_shuffle_ratio=0.4), "pixel_shuffle_ratio = 0.4"),
    (dict(intermediate_size=64), "intermediate_size = 64, which is not supported: expected 128"),
    (dict(intermediate_size=None), "intermediate_size = 5632"),
    (dict(vision_output_dim=32), "vision_output_dim = 32"),
    (dict(projector_input_dim=32), "projector_input_dim = 32"),
    (dict(image_size=[56, 56]), "image_size = [56, 56]"),
    (dict(image_size=60), "image_size = 60 is refused"),
    (dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "rope scaling 'linear'"),
  ],
)
def test_towers_that_would_compute_otherwise_are_refused(changes, words):
  with pytest.raises(UserError, match=re.escape(words)) as caught:
    read(**changes)
  assert "in vision_config" in str(caught.value) and "\n" not in str(caught.value)


def test_texts_at_odds_with_the_whole_are_refused():
  with pytest.raises(UserError, match="another tie_word_embeddings"):
    read(top={"tie_word_embeddings": True})


def test_a_tower_of_widths_that_the_original_cannot_have_is_named():
  config = read()
  wide = dataclasses.replace(config.vision, hidden_dim=64)
  with pytest.raises(UserError, match=r"Llama4ForConditionalGeneration.*intermediate_size = 64"):
    family_of(dataclasses.replace(config, vision=wide))
  other = dataclasses.replace(config.vision, norm_epsilon=1e-6)
  with pytest.raises(UserError, match="vision.norm_epsilon = 1e-05 instead of 1e-06"):
    family_of(dataclasses.replace(config, vision=other))
