"""Config files say a few fields, and the command line can set all of them."""

import re

import pytest
from ml_collections import config_dict
from training import tiny

from moe_jax.config.load import load_config, override
from moe_jax.errors import UserError
from moe_jax.training.config import ExperimentConfig, experiment_from, model_from
from moe_jax.training.template import choose_variant, full_config

FILES = [
  path for path in sorted((tiny.ROOT / "configs").glob("*.py")) if ":tiny" in path.read_text()
]
MODEL = dict(
  model_dim=8,
  segments=(("attention:dense", 1),),
  num_heads=1,
  num_kv_heads=1,
  head_dim=8,
  mlp=dict(hidden_dim=16),
)


def test_every_other_field_has_its_default():
  config = full_config({"model": MODEL, "steps": 7})
  assert experiment_from(config.to_dict()) == experiment_from({"model": MODEL, "steps": 7})
  assert config.optimizer.b2 == ExperimentConfig.optimizer.b2
  assert config.model.tie_embeddings is False
  assert "moe" not in config and "depth" not in config.model


def test_a_field_without_a_value_can_be_set():
  config = full_config({"model": MODEL})
  assert config.model.window is None
  override(config, "model.window", "4")
  assert experiment_from(config.to_dict()).model.attention.window == 4


def test_the_tokenizer_decides_a_vocabulary_that_is_not_given():
  assert "vocab_size" not in full_config({"model": MODEL}).model
  given = full_config({"model": MODEL | {"vocab_size": 300}})
  assert model_from(given.to_dict()).vocab_size == 300


def test_a_wrong_field_is_refused_with_its_path():
  with pytest.raises(UserError, match="config.model.model_dmi is not a field"):
    full_config({"model": MODEL | {"model_dmi": 8}})


def test_an_unknown_variant_names_all_and_the_nearest():
  with pytest.raises(UserError, match="'8x7' is not one of tiny, 8x7b; did you mean 8x7b?"):
    choose_variant("8x7", {"tiny": 1, "8x7b": 2})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_docstring_lists_the_variants_and_tiny_is_the_default(path):
  listed = re.findall(rf"^  configs/{path.name}:(\w+)", path.read_text(), flags=re.M)
  with pytest.raises(UserError) as refused:
    load_config(f"{path}:no_such_size")
  known = re.search(r"is not one of ([\w, ]+)", str(refused.value))[1].split(", ")
  assert listed == known
  default = load_config(str(path))
  assert isinstance(default, config_dict.ConfigDict)
  assert default.to_dict() == load_config(f"{path}:tiny").to_dict()
