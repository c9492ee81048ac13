"""Settings of the hub, old and new, become configs, and configs become the same settings."""

import json
import re
from pathlib import Path

import pytest
from convert.conftest import SETTINGS, config_of

from moe_jax.convert.families import FAMILIES, architecture_settings, family_in, family_of
from moe_jax.convert.family import as_segments
from moe_jax.convert.hub_config import HubConfig
from moe_jax.convert.rules import links, uncovered
from moe_jax.errors import UserError
from moe_jax.layers.rope_scaling import RopeScaling

FIXTURES = Path(__file__).parent.parent / "parity" / "fixtures"
FILES = {path.parent.name: path for path in sorted(FIXTURES.glob("*/config.json"))}
YARN = {
  "factor": 40,
  "beta_fast": 32,
  "beta_slow": 1,
  "mscale": 1.0,
  "mscale_all_dim": 1.0,
  "original_max_position_embeddings": 4096,
}


def as_loaded(hub: HubConfig):
  family = family_in(hub)
  config = family.read(hub)
  return config if family.drops else config.dropless()


@pytest.mark.parametrize("name", FILES)
def test_config_written_and_read_back_is_the_same(name):
  hub = HubConfig(json.loads(FILES[name].read_text()))
  config = as_loaded(hub)
  family = family_of(config)
  written = json.loads(json.dumps(architecture_settings(family, config)))
  assert family is family_in(hub) is family_in(HubConfig(written))
  assert as_loaded(HubConfig(written)) == config


@pytest.mark.parametrize("name", FILES)
def test_every_parameter_is_in_one_tensor_of_the_table(name):
  hub = HubConfig(json.loads(FILES[name].read_text()))
  family = family_in(hub)
  config = family.read(hub)
  assert uncovered(family.rules, config) == []
  found = links(family.rules, config)
  places = [(part.path, part.index) for link in found for part in link.slices]
  # Untied, the library reads two tables and keeps a third, which is here the decoder's again.
  again = config.encoder is not None and config.encoder.own_embedding
  assert len(places) == len(set(places)) + again
  shapes = json.loads((FILES[name].parent / "weights.json").read_text())["shapes"]
  assert {link.key: list(link.shape) for link in found} == shapes


def test_every_family_has_a_fixture():
  found = {family_in(HubConfig(json.loads(path.read_text()))).model_type for path in FILES.values()}
  assert found == {family.model_type for family in FAMILIES}


def test_aliases_of_the_number_of_experts_are_read():
  plain = config_of(SETTINGS)
  for alias in ("num_experts", "n_routed_experts"):
    renamed = dict(SETTINGS)
    renamed[alias] = renamed.pop("num_local_experts")
    assert config_of(renamed) == plain


@pytest.mark.parametrize(
  "rope",
  [
    {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **YARN}},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **YARN}},
    {"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **YARN}},
  ],
)
def test_old_and_new_styles_of_rotary_settings_mean_the_same(rope):
  attention = config_of({**SETTINGS, **rope}).attention
  expected = RopeScaling("yarn", 40, original_max_position=4096, mscale=1.0, mscale_all_dim=1.0)
  assert (attention.rope_theta, attention.rope_scaling) == (5e5, expected)


def test_other_kinds_of_rotary_scaling_keep_their_fields():
  linear = {"rope_scaling": {"type": "linear", "factor": 4.0}}
  assert config_of({**SETTINGS, **linear}).attention.rope_scaling == RopeScaling("linear", 4.0)
  llama3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
  }
  scaling = config_of({**SETTINGS, "rope_scaling": llama3}).attention.rope_scaling
  assert scaling == RopeScaling(
    "llama3", 8.0, original_max_position=64, low_freq_factor=1.0, high_freq_factor=4.0
  )


def test_absent_and_null_settings_take_the_librarys_defaults():
  config = config_of({**SETTINGS, "sliding_window": None, "head_dim": None})
  assert config == config_of(SETTINGS)
  assert config.attention.window is None and config.attention.head_dim == 4
  assert config.norm_epsilon == 1e-5


@pytest.mark.parametrize(
  ("blocks", "segments"),
  [
    (["a"] * 3, (("a", 3),)),
    (["d", "m", "m", "m"], (("d", 1), ("m", 3))),
    (["c", "c", "c", "g"] * 3, (("c c c g", 3),)),
    (["d", "d", "m", "m", "g"], (("d", 2), ("m", 2), ("g", 1))),
    (["d", "m"] * 2 + ["m"], (("d m", 2), ("m", 1))),
  ],
)
def test_blocks_become_the_longest_repeated_patterns(blocks, segments):
  assert as_segments(blocks) == segments


def variants(settings, values):
  """Yields the settings with each single one, nested ones too, replaced by each of the values."""
  for name, given in settings.items():
    if isinstance(given, dict):
      yield from ({**settings, name: section} for section in variants(given, values))
    yield from ({**settings, name: value} for value in values)


@pytest.mark.parametrize("name", [n for n in FILES if not re.search(r"_(p2|norm|tied|swa)$", n)])
def test_no_setting_of_a_wrong_type_is_met_by_surprise(name):
  refused = 0
  for settings in variants(json.loads(FILES[name].read_text()), ["12", -1, 0, 1.5, [1], {"a": 1}]):
    hub = HubConfig(settings)
    try:
      family_in(hub).read(hub).dropless()
    except UserError as error:
      refused += 1
      assert "\n" not in str(error)
  assert refused > 50


@pytest.mark.parametrize(
  "name, changes, words",
  [
    (
      "gpt_oss",
      {"layer_types": ["full_attention"]},
      "1 layer_types, expected num_hidden_layers = 4",
    ),
    ("qwen2_moe_mixed", {"layer_types": ["full_atention"] * 4}, "did you mean full_attention?"),
  ],
)
def test_lists_of_layers_have_one_known_entry_a_layer(name, changes, words):
  hub = HubConfig({**json.loads(FILES[name].read_text()), **changes})
  with pytest.raises(UserError, match=re.escape(words)):
    family_in(hub).read(hub)


def test_a_v2_that_renormalises_is_refused():
  hub = HubConfig({"model_type": "deepseek_v2", "norm_topk_prob": True})
  with pytest.raises(UserError, match="norm_topk_prob = true"):
    family_in(hub).read(hub)
