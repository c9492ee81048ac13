"""Attention's mask by hand, its parts against the loops, and the dropout function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from oracles import language_model, networks

from moe_jax.layers.attend import attend
from moe_jax.layers.attention import Attention
from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.layers.attention_context import Places, attention_mask
from moe_jax.layers.dropout import dropout, split_key
from moe_jax.layers.mlp import Activation, FeedForwardConfig, feed_forward
from moe_jax.layers.norms import Norm, make_norm
from moe_jax.layers.rotary import apply_rotary, rotary_table

# Float32 against float64 over sums of tens of terms.
TOLERANCE = 1e-6


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def places_of(token_mask, positions=None):
  """The places of a call without a cache: positions count the real tokens unless given."""
  token_mask = jnp.asarray(token_mask)
  if positions is None:
    positions = jnp.maximum(jnp.cumsum(token_mask, axis=1) - 1, 0)
  return Places(jnp.arange(token_mask.shape[1]), positions, positions, token_mask)


def mask_of(token_mask, **sight):
  return attention_mask(places_of(token_mask), **sight)


def test_attention_mask_by_hand():
  # Token 1 is padding: it sees itself and is seen by no other.
  expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
  mask = mask_of([[True, False, True, True]])
  np.testing.assert_array_equal(mask[0], np.array(expected, bool))


def test_window_counts_real_tokens():
  # Two real tokens back: padding in between takes no place in the window.
  expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]]
  mask = mask_of([[True, False, True, True]], window=2)
  np.testing.assert_array_equal(mask[0], np.array(expected, bool))


def test_attention_equals_jax():
  q, k, v = random(2, 5, 6, 4), random(2, 7, 3, 4, seed=1), random(2, 7, 3, 4, seed=2)
  mask = np.random.default_rng(3).random((2, 5, 7)) < 0.6
  mask[..., 0] = True
  expected = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
  assert relative_error(attend(*map(jnp.asarray, (q, k, v, mask))), expected) <= TOLERANCE


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_grouped_query_attention_equals_the_loops(num_kv_heads):
  config = AttentionConfig(num_heads=4, num_kv_heads=num_kv_heads, head_dim=6, rope_theta=50.0)
  layer = Attention(8, config, key=jax.random.key(0), scale=3.0)
  x, positions = random(1, 5, 8), np.array([[0, 2, 3, 7, 11]], np.int32)
  context = Attention.context(config, places_of(np.ones((1, 5), bool), jnp.asarray(positions)))
  y, cache = jax.jit(lambda x: layer(x, context))(jnp.asarray(x))
  assert cache is None
  weights = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(layer)))
  expected = language_model.attention_layer(x[0], weights, positions=positions[0], base=50.0)
  assert relative_error(y[0], expected) <= TOLERANCE


@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_rotary_equals_the_loops_far_from_the_start(theta):
  x, positions = random(1, 3, 2, 6), np.array([[0, 17, 1000]], np.int32)
  y = apply_rotary(jnp.asarray(x), rotary_table(jnp.asarray(positions), 6, theta))
  # An angle of 1000 radians is rounded to 3e-5 in float32.
  assert relative_error(y[0], language_model.rotary(x[0], positions[0], base=theta)) <= 6e-5


GATED = [FeedForwardConfig(5, gated=True, activation=each) for each in Activation]
NETWORKS = [
  *GATED,
  *(
    FeedForwardConfig(5, activation=each)
    for each in Activation
    if each != Activation.SHIFTED_QUICK_GELU
  ),
  *(dataclasses.replace(each, bias=True, clamp=0.4) for each in GATED),
  FeedForwardConfig(5, activation="relu", bias=True),
]


@pytest.mark.parametrize("config", NETWORKS, ids=str)
def test_feed_forward_equals_the_loops(config):
  shapes = {"up": (4, 5), "down": (5, 4)} | ({"gate": (4, 5)} if config.gated else {})
  shapes |= {f"{name}_bias": shape[1:] for name, shape in shapes.items()} if config.bias else {}
  weights = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
  x = random(3, 4, seed=9)
  y = feed_forward(jnp.asarray(x), jax.tree.map(jnp.asarray, weights), None, config)
  weights = jax.tree.map(np.float64, weights)
  options = str(config.activation), config.clamp
  expected = [networks.network(x_D, weights, options[0], clamp=options[1]) for x_D in x]
  assert relative_error(y, expected) <= TOLERANCE


@pytest.mark.parametrize("kind", list(Norm))
def test_norms_equal_the_loops_and_keep_the_dtype(kind):
  norm = make_norm(kind, 6, 0.1)
  for index, param in enumerate(jax.tree.leaves(nnx.state(norm), is_leaf=is_variable)):
    param.set_value(jnp.asarray(random(6, seed=index)))
  tree = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(norm)))
  x = random(4, 6, seed=7)
  centred = x - (0.0 if kind == "rmsnorm" else np.mean(x, axis=1, keepdims=True))
  expected = language_model.rms_norm(centred, tree["scale"], epsilon=0.1) + tree.get("bias", 0.0)
  assert relative_error(norm(jnp.asarray(x)), expected) <= TOLERANCE
  assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
  assert ("bias" in tree) == (kind == "layernorm")


def is_variable(node):
  return isinstance(node, nnx.Variable)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_keeps_the_expected_value(dtype):
  rate, n = 0.25, 40_000
  y = dropout(jnp.full((n,), 3.0, dtype), rate, jax.random.key(0))
  assert y.dtype == dtype
  kept = np.asarray(y, np.float64) != 0
  assert np.unique(np.asarray(y, np.float64)).tolist() == [0.0, 4.0]
  # 5 standard deviations of the share that is kept.
  assert abs(kept.mean() - 0.75) <= 5 * np.sqrt(0.25 * 0.75 / n)


def test_dropout_without_rate_or_key_is_the_identity():
  x = jnp.asarray(random(3, 4))
  assert dropout(x, 0.0, jax.random.key(0)) is x
  assert dropout(x, 0.5, None) is x


def test_split_key_splits_or_passes_none_on():
  assert split_key(None, 3) == [None, None, None]
  keys = [jax.random.key_data(key).tolist() for key in split_key(jax.random.key(0), 3)]
  assert len(set(map(tuple, keys))) == 3
