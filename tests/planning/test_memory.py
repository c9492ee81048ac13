"""Bytes are those of the arrays that the model, its optimiser and its cache would be made of."""

import jax
import pytest
from planning.real_model import abstract_model
from training import tiny

from moe_jax.config.load import load_config
from moe_jax.models import ModelConfig
from moe_jax.planning.memory import (
  cache_bytes_per_sequence,
  cache_bytes_per_token,
  optimizer_bytes,
  weight_bytes,
)
from moe_jax.training.config import OptimizerConfig, model_from
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.optimizer_config import OptimizerName
from moe_jax.training.state import abstract_state

SOURCES = [
  "glam.py:tiny",
  "mixtral.py:8x7b",
  "deepseek.py:tiny",
  "deepseek.py:v2",
  "llama4.py:tiny",
  "llama4.py:maverick_text",
  "jamba.py:tiny",
  "jamba.py:v0_1",
]


def model_of(source: str) -> ModelConfig:
  return model_from(load_config(f"{tiny.ROOT}/configs/{source}").to_dict())


def bytes_of(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("source", SOURCES)
def test_a_token_takes_the_bytes_of_one_cache_slot(source):
  config = model_of(source)
  model = abstract_model(config)
  few, more = (jax.eval_shape(lambda n=n: model.init_cache(1, n)) for n in (7, 8))
  # One byte a slot tells whether it holds a token.
  assert bytes_of(more) - bytes_of(few) == cache_bytes_per_token(config) + 1


@pytest.mark.parametrize("source", ["jamba.py:tiny", "jamba.py:v0_1", "mixtral.py:tiny"])
def test_a_sequence_takes_the_bytes_of_its_states(source):
  config = model_of(source)
  model = abstract_model(config)
  caches = jax.eval_shape(lambda: model.init_cache(3, 7)).segments
  row = cache_bytes_per_sequence(config) + 7 * cache_bytes_per_token(config)
  assert bytes_of(caches) == 3 * row


def test_jambas_cache_is_the_papers():
  # arXiv 2403.19887 Table 1: 4 GB for 256K tokens in 16 bits; its states are 16 MB more.
  config = model_of("jamba.py:v0_1")
  assert 256 * 1024 * cache_bytes_per_token(config) == 4 * 2**30
  # In 28 layers of 8,192 channels: 3 places of 2 bytes, 16 states of 4.
  assert cache_bytes_per_sequence(config) == 28 * 8192 * (3 * 2 + 16 * 4)


def test_deepseeks_cache_is_the_papers():
  # arXiv 2405.04434 section 2.1.4: (d_c + d_h^R) l = 576 numbers in each of 60 layers.
  assert cache_bytes_per_token(model_of("deepseek.py:v2")) == 2 * 576 * 60


@pytest.mark.parametrize("name", list(OptimizerName))
@pytest.mark.parametrize("source", ["mixtral.py:tiny", "deepseek.py:v3"])
def test_weights_and_moments_are_those_of_a_training_state(source, name):
  config = model_of(source)
  state = abstract_state(config, make_optimizer(OptimizerConfig(name=name), 10))
  assert bytes_of((state.params, state.router_state)) == weight_bytes(config)
  counters = bytes_of(state.opt_state) - optimizer_bytes(config, name)
  assert 0 <= counters <= 16


def test_adafactor_keeps_rows_and_columns_of_a_large_model():
  config = model_of("mixtral.py:8x7b")
  D, F, V, layers = 4096, 14336, 32000, 32
  experts = 8 * 3 * (D + F)
  # (D, heads, 128): the two largest axes are D and the width of a head.
  attention = 2 * sum(heads * (D + 128) for heads in (32, 8))
  # Eight columns are too few to factor.
  rest = 8 * D + 2 * D
  numbers = layers * (experts + attention + rest) + D + 2 * (D + V)
  # Scalars stand for the statistics that an array does not have.
  assert 0 <= optimizer_bytes(config, OptimizerName.ADAFACTOR) - 4 * numbers <= 100
