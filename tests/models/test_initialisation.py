"""Parameters at birth: their deviation, their truncation, their names, and none twice."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_models import DENSE, MOE, random_parameters, tiny_config, tiny_routing

from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.layers.parameters import LOGICAL_AXES, logical_axes, parameter
from moe_jax.models import Decoder, ModelConfig
from moe_jax.moe import MoEConfig

# Every fan-in differs from every other: D = 64, heads * width = 32, F = 48 dense and 40 expert.
FAN_IN = {
  "embedding": 64,
  "head": 64,
  "query": 64,
  "key": 64,
  "value": 64,
  "out": 32,
  "dense gate": 64,
  "dense up": 64,
  "dense down": 48,
  "router": 64,
  "expert gate": 64,
  "expert up": 64,
  "expert down": 40,
}
# The embedding and the head keep unit scale; see Decoder.
UNSCALED = ("embedding", "head")
# A normal truncated at 2 of its deviations s keeps a deviation of 0.8796 s.
TRUNCATION = 2 / 0.87962566


def born(init_scale):
  """Returns {kind: array} of a fresh model with 2 repeats of a dense and an expert block."""
  network = dict(gated=True)
  config = ModelConfig(
    vocab_size=50,
    model_dim=64,
    segments=(("attention:dense attention:moe", 2),),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    mlp=FeedForwardConfig(48, **network),
    moe=MoEConfig(tiny_routing(), 40, **network),
    init_scale=init_scale,
  )
  tree = nnx.to_pure_dict(nnx.split(Decoder(config, key=jax.random.key(7)))[1])
  dense, moe = tree["segments"][0]["blocks"].values()
  found = {
    "embedding": tree["embedding"],
    "head": tree["head"],
    "router": moe["feed_forward"]["router"]["kernel"],
  }
  found |= {name: dense["mixer"][name] for name in ("query", "key", "value", "out")}
  for name in ("gate", "up", "down"):
    found["dense " + name] = dense["feed_forward"]["weights"][name]
    found["expert " + name] = moe["feed_forward"]["experts"]["weights"][name]
  return {name: np.asarray(value, np.float64) for name, value in found.items()}


@pytest.fixture(scope="module")
def births():
  return {scale: born(scale) for scale in (1.0, 0.1)}


@pytest.mark.parametrize("kind", FAN_IN)
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_standard_deviation_is_the_root_of_scale_over_fan_in(births, kind, scale):
  values = births[scale][kind]
  expected = np.sqrt((1.0 if kind in UNSCALED else scale) / FAN_IN[kind])
  # 5 standard errors of the deviation (a normal's bound) and of the mean.
  assert abs(values.std() / expected - 1) <= 5 / np.sqrt(2 * values.size)
  assert abs(values.mean()) <= 5 * expected / np.sqrt(values.size)
  largest = np.abs(values).max() / expected
  assert largest <= TRUNCATION * (1 + 1e-5)
  # Near the bound, so that it is this bound: 512 draws pass 80 % of it with certainty enough.
  assert largest >= 0.8 * TRUNCATION


def test_every_layer_expert_and_matrix_is_drawn_apart(births):
  matrices = []
  for kind, values in births[1.0].items():
    lead = 0 if kind in UNSCALED else 2 if kind.startswith("expert") else 1
    matrices += list(values.reshape((-1,) + values.shape[lead:]))
  # 2 unscaled, 2 layers of 8 kinds, 2 * 4 experts of 3 matrices.
  assert len(matrices) == 2 + 2 * 8 + 8 * 3
  for a, b in itertools.combinations(matrices, 2):
    n = min(a.size, b.size)
    correlation = np.corrcoef(a.ravel()[:n], b.ravel()[:n])[0, 1]
    assert abs(correlation) < 6 / np.sqrt(n)


def test_another_key_gives_other_parameters():
  def draw(seed):
    return parameter(jax.random.key(seed), (8, 8), ("embed", "mlp"), fan_in=8)[...]

  assert np.array_equal(draw(0), draw(0)) and not np.array_equal(draw(0), draw(1))


CONFIGS = {
  "alternating, gated, untied": tiny_config(),
  "dense, plain, tied": tiny_config(segments=DENSE, gated=False, tie_embeddings=True),
  "moe, plain": tiny_config(segments=MOE, gated=False),
  "two segments": tiny_config(segments=DENSE + MOE),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_axis_of_every_parameter_has_a_documented_name(config):
  params = random_parameters(config)[1]
  for path, param in nnx.to_flat_state(params):
    axes = param.get_metadata()["axes"]
    assert len(axes) == param.get_value().ndim, path
    assert set(axes) <= set(LOGICAL_AXES), path
    # A mesh axis can shard one axis of an array only.
    assert len(set(axes)) == len(axes), path
    assert (axes[0] == "layers") == ("segments" in path), path
    assert ("expert" in axes) == ("experts" in path), path
    if "experts" in path:
      assert axes[:2] == ("layers", "expert")


def test_logical_axes_is_parallel_to_the_parameters():
  params = random_parameters(CONFIGS["moe, plain"])[1]
  names = logical_axes(params)
  block = names["segments"][0]["blocks"][0]
  assert block["mixer"]["query"] == ("layers", "embed", "heads", "head_dim")
  assert block["mixer"]["out"] == ("layers", "heads", "head_dim", "embed")
  assert block["feed_forward"]["router"]["kernel"] == ("layers", "embed", "router")
  experts = block["feed_forward"]["experts"]["weights"]
  assert experts["up"] == ("layers", "expert", "expert_embed", "expert_mlp")
  assert experts["down"] == ("layers", "expert", "expert_mlp", "expert_embed")
  assert names["embedding"] == ("vocab", "embed")


@pytest.mark.parametrize("axes", [("embed",), ("embed", "mpl")])
def test_axes_that_are_missing_or_unknown_are_a_programming_error(axes):
  with pytest.raises(ValueError, match="axes|mpl"):
    parameter(jax.random.key(0), (2, 3), axes, fan_in=2)
