"""Attention's mask by hand, its parts against the loops, and the dropout function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from oracles import language_model

from moe_jax.layers.attention import Attention, AttentionConfig, AttentionContext, causal_mask
from moe_jax.layers.dropout import dropout, split_key
from moe_jax.layers.mlp import Activation, FeedForwardConfig, feed_forward
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.rotary import apply_rotary

# Float32 against float64 over sums of tens of terms.
TOLERANCE = 1e-6


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_causal_mask_by_hand():
  # Token 1 is padding; tokens 0..2 are one document, 3 another.
  token_mask = jnp.array([[True, False, True, True]])
  segment_ids = jnp.array([[1, 1, 1, 2]])
  expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
  mask = causal_mask(token_mask, segment_ids)
  assert mask.shape == (1, 1, 4, 4)
  np.testing.assert_array_equal(mask[0, 0], np.array(expected, bool))
  expected[3] = [1, 0, 1, 1]
  np.testing.assert_array_equal(causal_mask(token_mask, None)[0, 0], np.array(expected, bool))


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_grouped_query_attention_equals_the_loops(num_kv_heads):
  config = AttentionConfig(num_heads=4, num_kv_heads=num_kv_heads, head_dim=6, rope_theta=50.0)
  layer = Attention(8, config, key=jax.random.key(0), scale=3.0)
  x, positions = random(1, 5, 8), np.array([[0, 2, 3, 7, 11]], np.int32)
  context = AttentionContext(jnp.asarray(positions), causal_mask(jnp.ones((1, 5), bool), None))
  y, cache = jax.jit(lambda x: layer(x, context))(jnp.asarray(x))
  assert cache is None
  weights = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(layer)))
  expected = language_model.attention_layer(x[0], weights, positions=positions[0], base=50.0)
  assert relative_error(y[0], expected) <= TOLERANCE


@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_rotary_equals_the_loops_far_from_the_start(theta):
  x, positions = random(1, 3, 2, 6), np.array([[0, 17, 1000]], np.int32)
  y = apply_rotary(jnp.asarray(x), jnp.asarray(positions), theta)
  # An angle of 1000 radians is rounded to 3e-5 in float32.
  assert relative_error(y[0], language_model.rotary(x[0], positions[0], base=theta)) <= 6e-5


def test_rms_norm_equals_the_loops_and_keeps_the_dtype():
  norm = RMSNorm(6, epsilon=0.1)
  norm.scale.set_value(jnp.asarray(random(6, seed=1)))
  x = random(4, 6)
  expected = language_model.rms_norm(x, random(6, seed=1), epsilon=0.1)
  assert relative_error(norm(jnp.asarray(x)), expected) <= TOLERANCE
  assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward_equals_the_loops(gated, activation):
  names = ("gate", "up", "down") if gated else ("up", "down")
  shapes = {"gate": (4, 5), "up": (4, 5), "down": (5, 4)}
  weights = {name: random(*shapes[name], seed=i) for i, name in enumerate(names)}
  theirs = {"wo": weights["down"], ("wi_up" if gated else "wi"): weights["up"]}
  theirs |= {"wi_gate": weights["gate"]} if gated else {}
  x = random(3, 4, seed=9)
  config = FeedForwardConfig(5, gated=gated, activation=activation)
  y = feed_forward(jnp.asarray(x), jax.tree.map(jnp.asarray, weights), None, config)
  expected = language_model.dense_ffn(
    x.astype(np.float64), jax.tree.map(np.float64, theirs), str(activation)
  )
  assert relative_error(y, expected) <= TOLERANCE


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
