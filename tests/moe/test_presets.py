"""Presets hold the values of their sources, and keep to the rules of configs at any size."""

import pytest
from small_presets import small_preset

from moe_jax.moe import RoutingConfig, expert_capacity, preset, preset_names
from moe_jax.moe.library_presets import LIBRARY_PRESETS
from moe_jax.moe.paper_presets import PAPER_PRESETS

NAMES = """
  shazeer switch gshard nllb glam st_moe vmoe expert_choice base hash random soft_moe mixtral olmoe
  deepseek_moe deepseek_v2 deepseek_v3 llama4 jamba qwen3_moe gpt_oss remoe grin
  deepspeed_moe tutel megablocks flaxformer maxtext megatron praxis
"""

# E, K, and what sets the paper apart, written down from the papers.
PAPERS = {
  "shazeer": (256, 4, dict(noise="learned", importance_loss_weight=0.1, load_loss_weight=0.1)),
  "gshard": (2048, 2, dict(selection="random_second", weighting="renormalized")),
  "switch": (128, 1, dict(weighting="raw", capacity_factor=1.25, balance_loss_weight=0.01)),
  "nllb": (128, 2, dict(weighting="renormalized_after_drop", weight_scale=0.8)),
  "glam": (64, 2, dict(weighting="renormalized", capacity_factor=2.0, selection="top_k")),
  "st_moe": (64, 2, dict(second_threshold=0.2, z_loss_weight=1e-3, eval_capacity_factor=2.0)),
  "vmoe": (32, 2, dict(noise="gaussian", noise_std=1 / 32, capacity_factor=1.05)),
  "mixtral": (8, 2, dict(weighting="softmax_selected", overflow="dropless")),
  "olmoe": (64, 8, dict(weighting="raw", balance_loss_weight=0.01, z_loss_weight=0.001)),
  "deepseek_moe": (64, 6, dict(weighting="raw", balance_fraction="all_choices_mean")),
  "deepseek_v2": (
    160,
    6,
    dict(
      num_expert_groups=8,
      top_expert_groups=3,
      group_score="max",
      device_loss_weight=0.05,
      communication_loss_weight=0.02,
    ),
  ),
  "deepseek_v3": (256, 8, dict(score="sigmoid", bias_update="sign", weight_scale=2.5)),
  "llama4": (16, 1, dict(score="sigmoid", weight_on="input")),
  "qwen3_moe": (128, 8, dict(weighting="renormalized", balance_scope="global_batch")),
  "gpt_oss": (128, 4, dict(weighting="softmax_selected", projection="affine")),
  "jamba": (16, 2, dict(weighting="raw")),
  "remoe": (8, 1, dict(score="relu", selection="positive", adaptive_target=1.0)),
  "grin": (16, 2, dict(selection="sparsemixer")),
}

# Slots of an expert for S = 2000, E = 48, K = 2 at a factor of 1.25, as each library's own code
# rounds 52.08 slots a token or 104.17 for two choices.
SLOTS = {
  "flaxformer": 52,
  "praxis": 52,
  "megablocks": 104,
  "tutel": 104,
  "megatron": 105,
  "deepspeed_moe": 105,
  "maxtext": 105,
  "vmoe": 108,
}

# What papers leave open and codes decide: what f of the balance loss counts (uniform routing costs
# 1, or K with all_choices), who is served first, when weights are normalised.
HABITS = {
  "flaxformer": ("all_choices", "choice_major", "position", "raw"),
  "vmoe": ("first_choice", "choice_major", "position", "raw"),
  "praxis": ("first_choice", "choice_major", "position", "renormalized"),
  "tutel": ("first_choice", "choice_major", "position", "renormalized"),
  "deepspeed_moe": ("first_choice", "choice_major", "random", "raw"),
  "maxtext": ("all_choices", "token_major", "position", "softmax_selected"),
  "megablocks": ("all_choices_mean", "token_major", "position", "raw"),
  "megatron": ("all_choices_mean", "choice_major", "weight", "softmax_selected"),
}


def test_the_laboratory_has_every_router_it_names():
  assert preset_names() == sorted(NAMES.split())
  assert not set(PAPER_PRESETS) & set(LIBRARY_PRESETS)


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_s_preset_has_its_values(name):
  num_experts, top_k, fields = PAPERS[name]
  config = preset(name)
  assert (config.num_experts, config.top_k) == (num_experts, top_k)
  assert {field: getattr(config, field) for field in fields} == fields


@pytest.mark.parametrize("name", SLOTS)
def test_a_library_s_capacity_is_rounded_as_in_its_code(name):
  config = preset(name, num_experts=48, top_k=2, capacity_factor=1.25, overflow="drop")
  assert expert_capacity(config, 2000, train=True) == SLOTS[name]


@pytest.mark.parametrize("name", HABITS)
def test_a_library_s_preset_has_its_habits(name):
  config = preset(name)
  habits = config.balance_fraction, config.drop_order, config.priority, config.weighting
  assert habits == HABITS[name]


@pytest.mark.parametrize(
  ("rounding", "num_experts", "slots"),
  [
    # 40 assignments to 12 experts: 1.5 * ceil(3.33) = 6, each of two choices floor(1.5 * 2) = 3.
    ("floor_of_ceiled_assignments", 12, 6),
    ("floor_of_ceiled_tokens", 12, 6),
    ("ceil", 12, 5),
    # To 6 experts: 1.5 * ceil(6.67) = 10.5, each choice 1.5 * ceil(3.33) = 6.
    ("floor_of_ceiled_assignments", 6, 10),
    ("floor_of_ceiled_tokens", 6, 12),
    ("floor", 6, 10),
  ],
)
def test_rounding_before_the_factor_differs_from_rounding_after_it(rounding, num_experts, slots):
  fields = dict(num_experts=num_experts, top_k=2, capacity_factor=1.5, capacity_rounding=rounding)
  assert expert_capacity(RoutingConfig(**fields), 20, train=True) == slots


def test_the_noise_of_vmoe_follows_the_number_of_experts():
  assert preset("vmoe", num_experts=8).noise_std == 1 / 8
  assert preset("vmoe", num_experts=8, noise_std=0.5).noise_std == 0.5


@pytest.mark.parametrize("name", NAMES.split())
@pytest.mark.parametrize("num_experts", [4, 16])
def test_every_preset_can_be_resized_and_trained(name, num_experts):
  config = small_preset(name, num_experts)
  config.check_trainable()
  assert config.num_experts == num_experts
