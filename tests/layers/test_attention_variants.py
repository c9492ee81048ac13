"""Every option of attention equals plain loops in float64, whole and cached."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from layers.attention_layers import (
  attention_config,
  cached,
  latent_config,
  oracle,
  oracle_scaling,
  oracle_weights,
  random_input,
  random_layer,
  whole,
)
from oracles import attention_variants, finite_differences

from moe_jax.layers.rope_scaling import RopeScaling

# Float32 sums of tens of terms, through a softmax, against float64.
TOLERANCE = 5e-6

YARN = dict(kind="yarn", factor=8.0, original_max_position=64, beta_fast=4.0)
SCALINGS = {
  "linear": RopeScaling("linear", 4.0),
  "yarn": RopeScaling(**YARN),
  "yarn between dimensions": RopeScaling(**YARN, truncate=False),
  "yarn attention factor": RopeScaling(**YARN, attention_factor=1.3),
  "yarn mscales": RopeScaling(**YARN, mscale=1.0, mscale_all_dim=0.707),
  "llama3": RopeScaling("llama3", 8.0, original_max_position=64),
}
CONFIGS = {
  "window": attention_config(window=3),
  "chunk": attention_config(chunk=2),
  "partial rotary": attention_config(rotary_dim=4),
  "partial pairs": attention_config(rotary_layout="pairs", rotary_dim=4),
  "no positions": attention_config(positions="none", rope_theta=10_000.0),
  "biases": attention_config(qkv_bias=True, out_bias=True),
  "clip after biases": attention_config(qkv_clip=0.5, qkv_bias=True),
  "norm of projections, then clip": attention_config(
    qk_norm="projection", qk_norm_epsilon=0.1, qkv_clip=0.5
  ),
  "clip, then norm of heads": attention_config(qk_norm="head", qk_norm_epsilon=0.1, qkv_clip=0.5),
  "weightless norm": attention_config(qk_norm="l2", qk_norm_epsilon=0.1, rotary_layout="pairs"),
  "scale": attention_config(softmax_scale=0.9),
  "sinks": attention_config(sinks=True, window=3),
  "temperature": attention_config(
    query_temperature_floor=2, query_temperature_scale=0.5, positions="none", rope_theta=10_000.0
  ),
  "relative bias": attention_config(
    positions="none",
    rope_theta=10_000.0,
    relative_bias_buckets=4,
    relative_bias_max_distance=6,
    softmax_scale=1.0,
  ),
  "latent": latent_config(),
  "latent queries, halves": latent_config(query_rank=5, norm_epsilon=0.1, rotary_layout="halves"),
  "latent yarn": latent_config(rope_scaling=SCALINGS["yarn mscales"]),
  "yarn": attention_config(rope_scaling=SCALINGS["yarn"]),
}
# No padding; padding right; left; and between.
MASK = np.array(
  [[1] * 7, [1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1]], bool
)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_layer_equals_the_loops_under_any_padding_whole_and_cached(config):
  graph, params = random_layer(config)
  x, mask = random_input(*MASK.shape), jnp.asarray(MASK)
  weights = oracle_weights(params)
  expected = [
    oracle(config, weights, *pair) for pair in zip(x.astype(np.float64), MASK, strict=True)
  ]
  y = whole(graph, params, config, jnp.asarray(x), mask)
  assert relative_error(y[MASK], np.array(expected)[MASK]) <= TOLERANCE
  y, _ = cached(graph, params, config, jnp.asarray(x), mask, (6, 1))
  assert relative_error(y[MASK], np.array(expected)[MASK]) <= TOLERANCE


@pytest.mark.parametrize("theta", [100.0, 150_000.0])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_scaled_frequencies_equal_the_loops(scaling, theta):
  config = attention_config(rope_theta=theta, rope_scaling=scaling)
  plain = theta ** (-np.arange(16) / 16)
  expected = attention_variants.frequencies(32, theta, oracle_scaling(config))
  actual = plain * scaling.frequency_factors(32, theta)
  assert relative_error(actual, expected) <= 1e-12
  assert 0 < np.sum(~np.isclose(actual, plain)) <= 16


def test_the_latent_cache_holds_the_latent_and_one_rotated_key():
  config = latent_config(num_heads=7)
  graph, params = random_layer(config)
  x, mask = jnp.asarray(random_input(1, 3)), jnp.ones((1, 3), bool)
  _, cache = cached(graph, params, config, x, mask, (2, 1))
  shapes = sorted(leaf.shape for leaf in jax.tree.leaves(cache))
  assert shapes == [(1, 4, config.rope_dim), (1, 4, config.kv_rank)]
  latent = oracle_weights(params)["latent_norm"] * normalised(x, params)
  assert relative_error(cache.latent[:, :3], latent) <= TOLERANCE
  np.testing.assert_array_equal(cache.latent[:, 3], 0.0)


def normalised(x, params):
  """Returns the latents of x (B, L, D) divided by their root mean square."""
  latent = np.asarray(x, np.float64) @ oracle_weights(params)["latent_down"]
  return latent / np.sqrt(np.mean(latent**2, axis=-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize(
  "config",
  [
    attention_config(chunk=2, num_heads=2, num_kv_heads=1, head_dim=4),
    latent_config(query_rank=3, kv_rank=3, rope_dim=2),
    attention_config(sinks=True, num_heads=2, num_kv_heads=1, head_dim=4),
  ],
  ids=["chunk", "latent", "sinks"],
)
def test_gradients_equal_finite_differences_of_the_loops(config):
  graph, params = random_layer(config)
  x, mask = random_input(1, 5), np.array([[1, 1, 0, 1, 1]], bool)
  target = random_input(1, 5, seed=1) * mask[..., None]

  def total(params, x):
    return jnp.sum(whole(graph, params, config, x, jnp.asarray(mask)) * target)

  dparams, dx = jax.jit(jax.grad(total, argnums=(0, 1)))(params, jnp.asarray(x))
  weights, grads = oracle_weights(params), oracle_weights(dparams)
  x64 = x[0].astype(np.float64)

  def oracle_total(weights, x_LD):
    return np.sum(oracle(config, weights, x_LD, mask[0]) * target[0])

  expected = finite_differences.gradient(lambda a: oracle_total(weights, a), x64)
  assert relative_error(dx[0][mask[0]], expected[mask[0]]) <= TOLERANCE
  for name in weights:
    expected = finite_differences.gradient(
      lambda a, name=name: oracle_total(weights | {name: a}, x64), weights[name]
    )
    assert relative_error(grads[name], expected) <= TOLERANCE, name
