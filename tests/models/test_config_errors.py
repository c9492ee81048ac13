"""Configs refuse what cannot be, in one sentence with the value and the nearest valid choice."""

import dataclasses
import json

import pytest
from tiny_models import tiny_config, tiny_routing

from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.layers.mlp import Activation, FeedForwardConfig
from moe_jax.models import ModelConfig, Remat
from moe_jax.models.depth_config import DepthConfig
from moe_jax.moe import Dispatch, MoEConfig


def attention(**changes):
  return AttentionConfig(**{**dict(num_heads=6, num_kv_heads=2, head_dim=4), **changes})


def moe(**changes):
  return MoEConfig(tiny_routing(), **{"hidden_dim": 4, **changes})


REFUSED = [
  (tiny_config, dict(vocab_size=0), "vocab_size = 0 .* at least 1"),
  (tiny_config, dict(model_dim=-8), "model_dim = -8 .* at least 1"),
  (tiny_config, dict(scan_unroll=0), "scan_unroll = 0 .* at least 1"),
  (tiny_config, dict(dtype="float16"), "dtype = 'float16' .* float32, bfloat16"),
  (tiny_config, dict(dropout=1.0), r"dropout = 1.0 .* \[0, 1\)"),
  (tiny_config, dict(dropout=float("nan")), "dropout = nan"),
  (tiny_config, dict(init_scale=0.0), "init_scale = 0.0 .* greater than 0"),
  (tiny_config, dict(init_scale=float("nan")), "init_scale = nan"),
  (tiny_config, dict(norm_epsilon=-1e-6), "norm_epsilon = -1e-06 .* greater than 0"),
  (tiny_config, dict(remat="ful"), "remat = 'ful' .* none, full, dots; did you mean 'full'"),
  (tiny_config, dict(segments=()), r"segments = \(\) .*for example"),
  (tiny_config, dict(segments="attention:moe"), "segments = 'attention:moe' .*for example"),
  (tiny_config, dict(segments=(("attention:moe", 0),)), "at least one block and one repeat"),
  (tiny_config, dict(segments=(("  ", 2),)), "at least one block and one repeat"),
  (tiny_config, dict(segments=(("attention:moe", 2.0),)), r"pair such as \('attention"),
  (tiny_config, dict(segments=(("attention:moe", True),)), r"pair such as \('attention"),
  (tiny_config, dict(segments=(("attention:moe", 10**8),)), "too many blocks: .* at most 10000"),
  (tiny_config, dict(mtp_depth=2**31 - 1), "mtp_depth = 2147483647 .* at most 16"),
  (tiny_config, dict(segments=("attention:moe", 2)), r"pair such as \('attention"),
  (tiny_config, dict(segments=(("attention:mo", 2),)), "'attention:mo' .* mean attention:moe"),
  (tiny_config, dict(segments=(("atention:dense", 2),)), "did you mean attention:dense"),
  (tiny_config, dict(segments=(("attention", 2),)), "'attention' is not one of attention:dense"),
  (
    tiny_config,
    dict(
      segments=(("attention:moe:depth", 1),),
      depth=DepthConfig(),
      routing=dict(selection="hash", hash_ngram=2),
    ),
    "hash_ngram = 2 .* must be 1 in a 'moe:depth' block",
  ),
  (attention, dict(num_heads=0), "num_heads = 0 .* at least 1"),
  (attention, dict(num_kv_heads=0), "num_kv_heads = 0 .* at least 1"),
  (attention, dict(num_kv_heads=4), "4 does not divide num_heads = 6; the nearest that does is 3"),
  (attention, dict(num_kv_heads=12), "12 does not divide num_heads = 6; .* is 6"),
  (attention, dict(head_dim=5), "head_dim = 5 is odd.* for example 6"),
  (attention, dict(rope_theta=0.0), "rope_theta = 0.0 .* greater than 0"),
  (FeedForwardConfig, dict(hidden_dim=0), "hidden_dim = 0 .* at least 1"),
  (FeedForwardConfig, dict(hidden_dim=4, dropout=-0.1), r"dropout = -0.1 .* \[0, 1\)"),
  (FeedForwardConfig, dict(hidden_dim=4, activation="sillu"), "'sillu' .* did you mean 'silu'"),
  (moe, dict(hidden_dim=0), "hidden_dim = 0 .* at least 1"),
  (moe, dict(expert_dropout=1.0), r"expert_dropout = 1.0 .* \[0, 1\)"),
  (moe, dict(router_jitter=-0.1), r"router_jitter = -0.1 .* \[0, 1\)"),
  (moe, dict(dispatch="gathr"), "dispatch = 'gathr' .* did you mean 'gather'"),
  (moe, dict(activation="tanh"), "activation = 'tanh' is not one of relu, gelu, gelu_exact, silu"),
]


@pytest.mark.parametrize("make, given, message", REFUSED)
def test_refused_in_one_sentence(make, given, message):
  with pytest.raises(UserError, match=message) as caught:
    make(**given)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_a_moe_block_without_moe_is_refused():
  config = tiny_config()
  with pytest.raises(UserError, match="has moe blocks but moe is None"):
    ModelConfig(
      vocab_size=4,
      model_dim=8,
      segments=config.segments,
      attention=config.attention,
      mlp=config.mlp,
    )


def test_moe_without_a_moe_block_is_refused():
  with pytest.raises(UserError, match="has no moe block, so moe would be ignored"):
    dataclasses.replace(tiny_config(), segments=(("attention:dense", 2),))


def test_text_choices_become_members():
  assert tiny_config(remat="full").remat is Remat.FULL
  assert FeedForwardConfig(4, activation="gelu").activation is Activation.GELU
  assert moe(dispatch="einsum").dispatch is Dispatch.EINSUM


def test_segments_from_json_make_the_same_config():
  given = (("attention:dense attention:moe", 2), ("attention:dense", 1))
  config = tiny_config(segments=given)
  from_json = tiny_config(segments=json.loads(json.dumps(given)))
  assert from_json == config and hash(from_json) == hash(config)
  kinds = ["dense", "moe", "dense", "moe", "dense"]
  assert config.layers() == [("attention", kind) for kind in kinds]
