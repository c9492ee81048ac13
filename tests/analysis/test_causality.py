"""The audit finds the leaks that the definitions of the routers imply, and no others."""

import dataclasses

import pytest
from fast_compilation import compile_fast  # noqa: F401
from tiny_models import tiny_config

from moe_jax.analysis.causality import audit_router
from moe_jax.analysis.model_audit import audit_model
from moe_jax.moe import RoutingConfig, preset, preset_names, register_selection
from moe_jax.moe.selection import ask

# In training, by reading the definitions: what lets the future decide the past.
LEAK_THE_FUTURE = {
  "base": "selection = base",
  "expert_choice": "selection = expert_choice",
  "soft_moe": "selection = soft",
  "deepspeed_moe": "priority = random",
  "megatron": "priority = weight",
  # Two choices, choice-major, drops.
  "glam": "drop_order = choice_major",
  "gshard": "drop_order = choice_major",
  "nllb": "drop_order = choice_major",
  "praxis": "drop_order = choice_major",
  "st_moe": "drop_order = choice_major",
  "tutel": "drop_order = choice_major",
  "vmoe": "drop_order = choice_major",
}
# Sequences of a batch compete for slots (or are assigned together).
DEPEND_ON_THE_BATCH = {
  *("base", "expert_choice", "deepspeed_moe", "megatron", "st_moe", "tutel", "vmoe"),
  *("switch", "flaxformer", "nllb"),
}
# Outside training these look at no later token.
CAUSAL_OUTSIDE_TRAINING = ("base", "deepspeed_moe")


def small(**fields):
  return RoutingConfig(num_experts=8, top_k=2, capacity_factor=1.0, grouping="sequence", **fields)


@pytest.mark.parametrize("name", preset_names())
def test_presets_leak_in_training_exactly_where_their_definition_says(name):
  leak = audit_router(preset(name, num_experts=16), train=True)
  assert (leak.future > 0) == (name in LEAK_THE_FUTURE), leak.verdict
  assert (leak.batch > 0) == (name in DEPEND_ON_THE_BATCH), leak.verdict
  assert bool(leak.future_causes) == (leak.future > 0)
  assert bool(leak.batch_causes) == (leak.batch > 0)
  assert LEAK_THE_FUTURE.get(name, "is causal") in leak.verdict


@pytest.mark.parametrize("name", CAUSAL_OUTSIDE_TRAINING)
def test_training_alone_leaks_where_only_training_looks_ahead(name):
  leak = audit_router(preset(name, num_experts=16), train=False)
  assert leak.future == 0 and not leak.future_causes


@pytest.mark.parametrize(
  ("fields", "cause"),
  [
    (dict(priority="max_score"), "priority = max_score"),
    (dict(drop_order="token_major", overflow="reroute"), "overflow = reroute"),
    (dict(granularity="segment"), "granularity = segment"),
    (dict(selection="sinkhorn", top_k=1, overflow="dropless"), "selection = sinkhorn"),
    (dict(drop_order="token_major"), None),
    (dict(capacity_factor=8.0), None),
  ],
)
def test_each_field_that_leaks_is_named(fields, cause):
  config = dataclasses.replace(small(), **fields)
  leak = audit_router(config, train=True)
  assert (leak.future > 0) == (cause is not None)
  assert cause is None or any(cause in each for each in leak.future_causes)


def test_a_selection_that_hides_its_look_ahead_is_found_out():
  @register_selection("reversed_order")
  def reversed_order(view, config):
    return ask(view.logits[:, ::-1].argsort(axis=-1)[..., : config.top_k])

  leak = audit_router(small(selection="reversed_order", overflow="dropless"), train=True)
  assert leak.future > 0 and not leak.future_causes
  assert "registered as causal and is not" in leak.verdict


@pytest.mark.parametrize(("drop_order", "leaks"), [("choice_major", True), ("token_major", False)])
def test_a_model_s_logits_leak_with_its_router(drop_order, leaks):
  routing = dict(
    overflow="drop", eval_capacity_factor=0.75, grouping="sequence", drop_order=drop_order
  )
  config = tiny_config(routing=routing, segments=(("attention:moe", 1),))
  result = audit_model(config, train=False, shape=(2, 32))
  assert (result.future > result.tolerance) == leaks
  assert any(layer.future for layer in result.layers) == leaks
  assert result.batch <= result.tolerance
  assert ("LEAKS" in result.verdict) == leaks
