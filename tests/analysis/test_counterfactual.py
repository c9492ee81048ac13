"""Other routers over a run's parameters, and recorded experts forced on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from tiny_models import random_parameters, random_tokens, tiny_config

from moe_jax.analysis.counterfactual import counterfactual, part_of
from moe_jax.analysis.replay import check_replay, join_traces, replayed_loss
from moe_jax.analysis.routing_trace import record_routing
from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.models import Decoder, EncoderConfig
from moe_jax.moe import RouterInputs

CONFIG = tiny_config()
TOKENS = random_tokens(CONFIG, 3, 7)


def merged(config, state) -> Decoder:
  graph, own = part_of(config, state)
  return nnx.merge(graph, own)


def plans_of(config, seed=0, tokens=TOKENS):
  model = merged(config, random_parameters(CONFIG, seed)[1])
  return model(jnp.asarray(tokens), return_aux=True)[1].plans


def trace_of(seed=0, tokens=TOKENS):
  return record_routing(plans_of(CONFIG, seed, tokens), tokens, run="tiny", step=1)


def test_an_arm_changes_the_named_fields_of_the_dropless_router():
  arm = counterfactual(CONFIG, "top_k=1,weighting=raw,eval_capacity_factor=1.5")
  expected = dataclasses.replace(
    CONFIG.moe.routing, top_k=1, weighting="raw", eval_capacity_factor=1.5, capacity=None
  )
  assert arm.moe.routing == expected
  plans = plans_of(arm)
  assert all(plan.expert.shape[1] == TOKENS.size for plan in plans)


@pytest.mark.parametrize(
  ("arm", "said"),
  [
    ("topk=1", "did you mean top_k"),
    ("top_k", "FIELD=VALUE"),
    ("top_k=x", "an integer"),
    ("capacity_factor=x", "a number"),
    ("top_k=9", "between 1 and num_experts = 4"),
    ("num_experts=8", "has not"),
    ("noise=learned", "has not"),
    ("bias_update=sign", "has not"),
  ],
)
def test_an_arm_that_cannot_be_evaluated_is_refused(arm, said):
  with pytest.raises(UserError, match=said):
    counterfactual(CONFIG, arm)


def test_a_dense_model_has_no_router_to_change():
  with pytest.raises(UserError, match="no experts"):
    counterfactual(tiny_config(segments=(("attention:dense", 1),)), "top_k=1")


def test_a_run_with_a_selection_bias_is_evaluated_without_it():
  biased = tiny_config(routing=dict(bias_update="sign"))
  state = random_parameters(biased)[1]
  arm = counterfactual(biased, "bias_update=none")
  model = merged(arm, state)
  with_bias, without = (
    m(jnp.asarray(TOKENS), return_aux=True)[1].plans for m in (merged(biased, state), model)
  )
  assert not np.array_equal(with_bias[0].expert, without[0].expert)


def test_replaying_its_own_experts_changes_nothing():
  own, forced = replayed_loss(CONFIG, random_parameters(CONFIG)[1], trace_of())
  assert own == pytest.approx(forced, rel=1e-6)


@pytest.mark.parametrize(
  "routing",
  [
    dict(overflow="reroute", capacity=3),
    dict(noise="gaussian", load_loss_weight=0.1),
    dict(num_expert_groups=2, top_expert_groups=2, device_loss_weight=0.1),
    dict(num_expert_groups=2, top_expert_groups=2, communication_loss_weight=0.1),
  ],
)
def test_what_belongs_to_the_selection_of_a_run_does_not_hinder_its_replay(routing):
  config = tiny_config(routing=routing)
  check_replay(config, trace_of())


def test_a_router_that_cannot_weigh_forced_experts_is_refused():
  routing = dict(selection="hierarchical", num_expert_groups=2, top_expert_groups=2)
  with pytest.raises(UserError, match="has 6 logits for num_experts = 4"):
    check_replay(tiny_config(routing=routing), trace_of())


def test_replaying_the_experts_of_another_run_changes_the_routing_to_its_own():
  trace = trace_of(seed=5)
  ids = jnp.asarray(np.stack([layer.expert for layer in trace.layers]), jnp.int32)
  forced = CONFIG.with_routing(selection="replay").dropless()
  model = merged(forced, random_parameters(CONFIG)[1])
  inputs = RouterInputs(expert_ids=ids)
  _, aux = model(jnp.asarray(TOKENS), router_inputs=inputs, return_aux=True)
  for plan, layer in zip(aux.plans, trace.layers, strict=True):
    np.testing.assert_array_equal(plan.expert.reshape(layer.expert.shape), layer.expert)
  own, other = replayed_loss(CONFIG, random_parameters(CONFIG)[1], trace)
  assert abs(own - other) > 1e-4


def test_a_router_still_receives_a_gradient_through_replayed_experts():
  forced = CONFIG.with_routing(selection="replay").dropless()
  graph, state = part_of(forced, random_parameters(CONFIG)[1])
  ids = jnp.asarray(np.stack([layer.expert for layer in trace_of().layers]), jnp.int32)

  def loss(state):
    logits = nnx.merge(graph, state)(
      jnp.asarray(TOKENS), router_inputs=RouterInputs(expert_ids=ids), train=True
    )
    return jnp.mean(jnp.sin(logits))

  gradient = jax.grad(loss)(state)
  kernels = [g for path, g in nnx.to_flat_state(gradient) if path[-2:] == ("router", "kernel")]
  assert kernels and all(float(jnp.abs(g.get_value()).max()) > 0 for g in kernels)


def test_joined_traces_hold_all_rows_in_order():
  first, second = trace_of(), trace_of(tokens=random_tokens(CONFIG, 2, 7, seed=9))
  joined = join_traces([first, second])
  np.testing.assert_array_equal(joined.tokens, np.concatenate([first.tokens, second.tokens]))
  for i, layer in enumerate(joined.layers):
    assert layer.expert.shape == (5, 7, 2)
    np.testing.assert_array_equal(layer.expert[3:], second.layers[i].expert)


def test_an_encoder_decoder_replays_nothing():
  attention = AttentionConfig(2, 2, 4, positions="none")
  segments = (("attention:moe", 1),)
  pair = tiny_config(
    segments=segments,
    encoder=EncoderConfig(segments, attention),
    cross_attention=attention,
  )
  assert len(pair.moe_layers()) == len(CONFIG.moe_layers())
  with pytest.raises(UserError, match="of decoders alone"):
    check_replay(pair, trace_of())


def test_a_trace_of_another_shape_of_model_is_refused():
  smaller = tiny_config(routing=dict(top_k=1, weighting="raw"))
  with pytest.raises(UserError, match="must be equal"):
    replayed_loss(smaller, random_parameters(smaller)[1], trace_of())
  shallow = tiny_config(segments=(("attention:moe", 1),))
  with pytest.raises(UserError, match="MoE layers"):
    replayed_loss(shallow, random_parameters(shallow)[1], trace_of())
