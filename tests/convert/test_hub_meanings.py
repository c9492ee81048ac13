"""Settings that are absent, null, old or at odds mean what they mean to the original's code."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from convert.conftest import SETTINGS, config_of

from moe_jax.convert.families import architecture_settings, family_in, family_of
from moe_jax.convert.hub_config import HubConfig
from moe_jax.convert.loading import _ignored
from moe_jax.errors import UserError
from moe_jax.layers.rope_scaling import RopeScaling

FIXTURES = Path(__file__).parent.parent / "parity" / "fixtures"
ABSENT = object()
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
LONGROPE = {
  "type": "longrope",
  "short_factor": [1.0, 1.1, 1.2, 1.3],
  "long_factor": [2, 3, 4, 5],
  "original_max_position_embeddings": 64,
  "short_mscale": 1.2,
  "long_mscale": 1.5,
}


def read(fixture, **changes):
  """Returns the config of a fixture whose settings are changed, or taken away where ABSENT."""
  settings = {**json.loads((FIXTURES / fixture / "config.json").read_text()), **changes}
  return config_of({name: value for name, value in settings.items() if value is not ABSENT})


def written(config):
  return json.loads(json.dumps(architecture_settings(family_of(config), config)))


@pytest.mark.parametrize(
  ("fixture", "changes", "place", "expected"),
  [
    ("mixtral_8x7b", dict(num_attention_heads=8, num_key_value_heads=ABSENT), "num_kv_heads", 8),
    ("mixtral_8x7b", dict(num_attention_heads=16, num_key_value_heads=None), "num_kv_heads", 16),
    ("qwen3_moe", dict(num_key_value_heads=ABSENT), "num_kv_heads", 4),
    ("llama4_scout", dict(head_dim=ABSENT), "head_dim", 128),
    ("llama4_scout", dict(head_dim=None), "head_dim", 8),
    ("llama4_scout", dict(attention_chunk_size=ABSENT), "chunk", 8192),
    ("gpt_oss", dict(head_dim=ABSENT), "head_dim", 64),
    ("gpt_oss", dict(sliding_window=ABSENT), "window", 128),
    ("qwen3_moe", dict(use_sliding_window=True, sliding_window=ABSENT), "window", 4096),
    ("qwen3_moe", dict(use_sliding_window=True, sliding_window=None), "window", None),
    ("glm4_moe", dict(rope_parameters={"rope_theta": 1e4}), "rotary_dim", 8),
  ],
)
def test_absent_and_null_attention_settings(fixture, changes, place, expected):
  assert getattr(read(fixture, **changes).attention, place) == expected


def test_absent_settings_of_the_deepseeks():
  names = ("n_shared_experts", "first_k_dense_replace", "routed_scaling_factor")
  third = read("deepseek_v3", **dict.fromkeys(names, ABSENT))
  assert third.moe.shared_hidden_dim == third.moe.hidden_dim
  assert third.moe_layers() == [3] and third.moe.routing.weight_scale == 2.5
  second = read("deepseek_v2", n_shared_experts=ABSENT)
  assert second.moe.shared_hidden_dim == 2 * second.moe.hidden_dim
  assert read("deepseek_v3", q_lora_rank=ABSENT).latent_attention.query_rank == 1536
  assert read("deepseek_v3", q_lora_rank=None).latent_attention.query_rank is None


def test_a_gpt_oss_without_rotary_settings_has_yarn_and_one_saved_without_scaling_has_none():
  scaling = RopeScaling("yarn", 32.0, original_max_position=4096, truncate=False)
  assert read("gpt_oss", rope_parameters=ABSENT).attention.rope_scaling == scaling
  plain = read("gpt_oss", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
  settings = written(plain)
  assert settings["rope_scaling"]["rope_type"] == "default"
  assert config_of(settings) == plain


def test_the_older_style_wins_where_both_are_given():
  new = {"rope_type": "default", "rope_theta": 1e6}
  old = {"type": "linear", "factor": 4.0}
  attention = config_of(
    {**SETTINGS, "rope_parameters": new, "rope_scaling": old, "rope_theta": 7.0}
  ).attention
  assert (attention.rope_theta, attention.rope_scaling) == (7.0, RopeScaling("linear", 4.0))


def test_details_of_yarn_follow_the_original():
  outside = {**SETTINGS, "rope_scaling": YARN, "original_max_position_embeddings": 128}
  assert config_of(outside).attention.rope_scaling.original_max_position == 128
  # Null is no truth there, absence is.
  null = {**SETTINGS, "rope_scaling": {**YARN, "truncate": None}}
  assert config_of(null).attention.rope_scaling.truncate is False
  assert config_of({**SETTINGS, "rope_scaling": YARN}).attention.rope_scaling.truncate is True


def test_longrope_is_read_and_written():
  changes = dict(rope_parameters=ABSENT, rope_scaling=LONGROPE, rope_theta=1e4)
  config = read("phimoe", **changes, max_position_embeddings=256)
  assert config.attention.rope_scaling == RopeScaling(
    "longrope",
    4.0,
    original_max_position=64,
    short_factors=(1.0, 1.1, 1.2, 1.3),
    long_factors=(2.0, 3.0, 4.0, 5.0),
    short_mscale=1.2,
    long_mscale=1.5,
  )
  assert config_of(written(config)) == config
  # Only Phi's code knows factors of its own for cosine and sine.
  scaling = config_of({**SETTINGS, "head_dim": 8, "rope_scaling": {**LONGROPE, "factor": 4}})
  assert scaling.attention.rope_scaling.short_mscale is None


LINEAR = {"rope_type": "linear", "factor": 2.0}


def test_sizes_that_no_layer_uses_are_numbers_all_the_same():
  full = read("gpt_oss", layer_types=["full_attention"] * 4)
  assert written(full)["sliding_window"] == 128
  assert config_of(written(full)) == full
  assert written(read("llama4_scout", no_rope_layers=[0] * 4, layer_types=None))[
    "attention_chunk_size"
  ]


@pytest.mark.parametrize(
  ("fixture", "changes", "words"),
  [
    ("mixtral_8x7b", dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    ("deepseek_v3", dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    ("mixtral_8x7b", dict(rope_scaling={"full": LINEAR}), "rope settings for full apart"),
    ("mixtral_8x7b", dict(rope_scaling={**LONGROPE, "factor": 0.5}), "factor = 0.5"),
    ("olmoe", dict(rope_scaling={**LONGROPE, "long_factor": [1]}), "expected 4"),
    ("deepseek_v2", dict(rope_scaling={**LINEAR, "mscale_all_dim": 1.0}), "mscale_all_dim = 1.0"),
    ("deepseek_v2", dict(scoring_func="sigmoid"), 'scoring_func = "sigmoid"'),
    ("qwen2_moe", dict(layer_types=["sliding_attention"] * 3), "layer_types"),
    ("gpt_oss", dict(layer_types=["full_attention"]), "expected num_hidden_layers = 4"),
    (
      "gpt_oss",
      dict(layer_types=["chunked_attention"] * 4),
      "'chunked_attention' among layer_types",
    ),
    ("llama4_scout", dict(layer_types=["full_attention"] + ["chunked_attention"] * 3), "one kind"),
    ("phimoe", dict(num_experts_per_tok=1), "num_experts_per_tok = 1"),
    ("phimoe", dict(rope_parameters={**LINEAR, "short_mscale": 1.2}), "rope scaling linear"),
  ],
)
def test_what_would_be_computed_otherwise_is_refused(fixture, changes, words):
  with pytest.raises(UserError, match=re.escape(words)) as caught:
    read(fixture, **changes)
  assert "\n" not in str(caught.value)


def test_a_part_of_the_head_is_saved_only_where_the_original_rotates_it():
  config = config_of({**SETTINGS, "head_dim": 8})
  half = dataclasses.replace(config.attention, rotary_dim=4)
  with pytest.raises(UserError, match="nearest is"):
    family_of(dataclasses.replace(config, attention=half))
  glm = read("glm4_moe", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25})
  assert glm.attention.rotary_dim == 4 and config_of(written(glm)) == glm


def test_a_single_expert_of_a_deepseek_moe_keeps_its_weight():
  for top_k, weighting in ((1, "raw"), (2, "renormalized")):
    config = read("deepseek_v1", num_experts_per_tok=top_k, norm_topk_prob=True)
    assert config.moe.routing.weighting == weighting


@pytest.mark.parametrize(("first", "frequency"), [(3, 2), (2, 3), (0, 5), (1, 1), (5, 1)])
def test_any_frequency_of_experts_can_be_saved_again(first, frequency):
  changes = dict(first_k_dense_replace=first, moe_layer_freq=frequency, num_hidden_layers=6)
  config = read("deepseek_v1", **changes)
  assert config_of(written(config)) == config


def test_the_kinds_of_llama_4s_layers_follow_the_list():
  full = read("llama4_scout", layer_types=["full_attention"] * 4)
  assert full.attention.chunk is None and full.global_attention.chunk is None
  assert config_of(written(full)) == full
  chunked = read("llama4_scout", layer_types=["chunked_attention"] * 4)
  assert chunked.attention.chunk == chunked.global_attention.chunk == 8
  assert config_of(written(chunked)) == chunked
  longer = read("llama4_scout", no_rope_layers=[1, 0, 1, 1, 0, 0], layer_types=None)
  words = [word for word, _ in longer.layers()]
  assert words == ["attention", "global_attention", "attention", "attention"]


def test_layers_that_predict_further_tokens_are_left_out():
  hub = HubConfig(json.loads((FIXTURES / "deepseek_v3" / "config.json").read_text()))
  hub.values.pop("num_mtp_layers", None)
  hub.values["num_nextn_predict_layers"] = 2
  family = family_in(hub)
  patterns = _ignored(family, family.read(hub), hub)
  ignored = [i for i in range(8) if any(re.fullmatch(p, f"model.layers.{i}.x") for p in patterns)]
  assert ignored == [4, 5]
