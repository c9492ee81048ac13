"""Attention and rope scaling refuse what cannot be, in one sentence with the nearest valid one."""

import pytest
from layers.attention_layers import attention_config, latent_config

from moe_jax.errors import UserError
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.layers.rope_scaling import RopeScaling

NO_ROPE = dict(positions="none", rope_theta=10_000.0)


def yarn(**changes):
  return RopeScaling(**{**dict(kind="yarn", factor=4.0, original_max_position=64), **changes})


REFUSED = [
  (attention_config, dict(positions="rotatory"), "did you mean 'rotary'"),
  (attention_config, dict(rotary_layout="half"), "'half' is not one of halves, pairs"),
  (attention_config, dict(qk_norm="heads"), "did you mean 'head'"),
  (attention_config, dict(rotary_dim=5), "rotary_dim = 5 .* even, from 2 to head_dim = 8"),
  (attention_config, dict(rotary_dim=10), "rotary_dim = 10 .* even, from 2 to head_dim = 8"),
  (attention_config, dict(window=2, chunk=3), "window = 2 and chunk = 3 contradict"),
  (attention_config, dict(chunk=0), "chunk = 0 .* at least 1, or None"),
  (attention_config, dict(qkv_clip=0.0), "qkv_clip = 0.0 .* greater than 0"),
  (attention_config, dict(softmax_scale=float("nan")), "softmax_scale = nan"),
  (attention_config, dict(qk_norm_epsilon=-1.0), "qk_norm_epsilon = -1.0"),
  (attention_config, dict(query_temperature_floor=0), "query_temperature_floor = 0 .* at least 1"),
  (attention_config, dict(query_temperature_scale=0.0), "query_temperature_scale = 0.0"),
  (attention_config, dict(positions="none"), "rope_theta = 100.0 would be ignored"),
  (attention_config, dict(NO_ROPE, rotary_dim=4), "rotary_dim = 4 would be ignored"),
  (attention_config, dict(NO_ROPE, rope_scaling=yarn()), "rope_scaling .* would be ignored"),
  (attention_config, dict(relative_bias_buckets=8), "would count positions twice"),
  (attention_config, dict(NO_ROPE, relative_bias_buckets=1), "relative_bias_buckets = 1 .* 2"),
  (
    attention_config,
    dict(num_heads=2**31 - 1, num_kv_heads=2),
    "num_kv_heads = 2 does not divide num_heads = 2147483647; the nearest that does is 1",
  ),
  (
    attention_config,
    dict(NO_ROPE, relative_bias_buckets=8, relative_bias_max_distance=4),
    "relative_bias_max_distance = 4 .* at least 5",
  ),
  (latent_config, dict(kv_rank=0), "kv_rank = 0 .* at least 1"),
  (latent_config, dict(query_rank=0), "query_rank = 0 .* or None"),
  (latent_config, dict(rope_dim=3), "rope_dim = 3 is odd.* for example 4"),
  (latent_config, dict(norm_epsilon=0.0), "norm_epsilon = 0.0"),
  (yarn, dict(kind="yarm"), "did you mean 'yarn'"),
  (yarn, dict(factor=0.5), "factor = 0.5 .* at least 1"),
  (yarn, dict(original_max_position=None), "original_max_position = None .* kind = yarn needs"),
  (yarn, dict(beta_fast=1.0), "beta_fast = 1.0 .* greater than beta_slow = 1.0"),
  (yarn, dict(mscale=0.0), "mscale = 0.0 .* greater than 0"),
  (yarn, dict(low_freq_factor=2.0), "low_freq_factor = 2.0 would be ignored: kind = yarn has"),
  (yarn, dict(kind="llama3", truncate=False), "truncate = False would be ignored"),
  (yarn, dict(kind="linear"), "original_max_position = 64 would be ignored"),
  (FeedForwardConfig, dict(hidden_dim=4, clamp=7.0), "clamp = 7.0 .* use gated = true"),
  (FeedForwardConfig, dict(hidden_dim=4, gated=True, clamp=0.0), "clamp = 0.0 .* greater than 0"),
  (
    FeedForwardConfig,
    dict(hidden_dim=4, activation="shifted_quick_gelu"),
    "activation = shifted_quick_gelu .* use gated = true",
  ),
]


@pytest.mark.parametrize("make, given, message", REFUSED)
def test_refused_in_one_sentence(make, given, message):
  with pytest.raises(UserError, match=message) as caught:
    make(**given)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
