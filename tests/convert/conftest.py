"""A tiny Mixtral, as a model and as a saved checkpoint that a test may damage."""

import shutil

import jax
import pytest

from moe_jax.convert import save_pretrained
from moe_jax.convert.families import family_in
from moe_jax.convert.hub_config import HubConfig
from moe_jax.models import Decoder

SETTINGS = {
  "architectures": ["MixtralForCausalLM"],
  "model_type": "mixtral",
  "vocab_size": 16,
  "hidden_size": 8,
  "intermediate_size": 12,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "num_local_experts": 2,
  "num_experts_per_tok": 1,
  "rope_theta": 1e6,
}


def config_of(settings):
  hub = HubConfig(settings)
  return family_in(hub).read(hub).dropless()


@pytest.fixture(scope="session")
def settings():
  return dict(SETTINGS)


@pytest.fixture(scope="session")
def config():
  return config_of(SETTINGS)


@pytest.fixture(scope="session")
def model(config):
  return Decoder(config, key=jax.random.key(0))


@pytest.fixture(scope="session")
def pristine(model, config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("pristine") / "checkpoint"
  save_pretrained(model, config, folder)
  return folder


@pytest.fixture
def checkpoint(pristine, tmp_path):
  return shutil.copytree(pristine, tmp_path / "checkpoint")
