"""Every published size has the parameters that its source's hyper-parameters come to."""

import json

import pytest
from planning.real_model import sizes_by_component
from training import tiny

from moe_jax.config.load import load_config
from moe_jax.planning.count import count_parameters
from moe_jax.training.config import model_from

MODELS = json.loads((tiny.ROOT / "tests/fixtures/published_parameters.json").read_text())["models"]


def model_of(source: str):
  return model_from(load_config(f"{tiny.ROOT}/{source}").to_dict())


@pytest.mark.parametrize("source", MODELS)
def test_counts_are_those_of_the_source(source):
  count, published = count_parameters(model_of(source)), MODELS[source]
  assert count.total == published["total"]
  assert count.active == published["active"]
  without = published["active_without_input_embedding"]
  assert count.active_without_input_embedding == without


@pytest.mark.parametrize("source", MODELS)
def test_the_real_model_has_those_shapes(source):
  config = model_of(source)
  count, sizes = count_parameters(config), sizes_by_component(config)
  assert sizes.pop("selection_biases", 0) == count.selection_biases
  assert sizes == {name: part.total for name, part in count.components.items()}
