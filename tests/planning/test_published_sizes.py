"""Every published size has the parameters that its source's hyper-parameters come to."""

import json
import re

import pytest
from planning.real_model import sizes_by_component
from training import tiny

from moe_jax.config.load import load_config
from moe_jax.planning.count import count_parameters
from moe_jax.planning.flops import training_flops_per_token
from moe_jax.planning.memory import cache_bytes_per_token
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
  sizes.pop("multi_token state", None)
  assert sizes.pop("router state", 0) == count.selection_biases
  assert sizes.pop("multi_token", 0) == count.multi_token.total
  assert sizes == {name: part.total for name, part in count.components.items()}


def written(number: float) -> str:
  """As docstrings write parameters: two decimals of 1e9, below that whole millions."""
  return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"


@pytest.mark.parametrize("path", sorted((tiny.ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_docstrings_tell_counts_and_cost(path):
  lines = re.findall(r"^  configs/(\S+) +(.*), ([\d.]+) GFLOP$", path.read_text(), flags=re.M)
  assert bool(lines) == (f"{path.name}:tiny" in path.read_text())
  for source, sizes, gigaflops in lines:
    mapping = load_config(f"{tiny.ROOT}/configs/{source}").to_dict()
    config = model_from(mapping)
    count = count_parameters(config)
    expected = f"{written(count.total)} total, {written(count.active)} active"
    if config.moe is None:
      expected = f"{written(count.total)}, dense"
    assert sizes == expected, source
    flops = training_flops_per_token(config, mapping["data"]["sequence_length"]) / 1e9
    decimals = len(gigaflops.partition(".")[2])
    assert gigaflops == f"{flops:.{decimals}f}", source


def test_deepseeks_own_accounts_of_cost_and_cache():
  # arXiv 2505.09343 Table 2: 155 and 250 GFLOP to train on a token, of sequences of 4,096; Table 1:
  # 70.272 KB of cache a token.
  for variant, gigaflops in (("v2", 155), ("v3", 250)):
    config = model_of(f"configs/deepseek.py:{variant}")
    assert round(training_flops_per_token(config, 4096) / 1e9) == gigaflops
  assert cache_bytes_per_token(config) == 70_272
