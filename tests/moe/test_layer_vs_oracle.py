"""MoELayer and all its gradients equal the oracle's, in every form of dispatch."""

import jax
import numpy as np
import pytest
from moe.layer_and_oracle import (
  MASKS,
  B,
  L,
  compiled_layer,
  run_and_compare,
  split_layer,
  without_expert,
)

from moe_jax.moe import Dispatch, MoEConfig, RoutingConfig

F, E = 5, 4


def config_of(activation, *, gated, top_k, shared=None, **routing):
  fields = RoutingConfig(num_experts=E, top_k=top_k, **routing)
  more = {"shared_hidden_dim": 3, "shared_combine": shared} if shared else {}
  return MoEConfig(fields, F, gated=gated, activation=activation, **more)


CASES = {
  "one_choice": config_of("relu", gated=False, top_k=1, capacity=2, grouping="sequence"),
  "two_choices": config_of(
    "silu", gated=True, top_k=2, capacity=2, weighting="renormalized", grouping="sequence"
  ),
  # 10 tokens in groups of 4, the last with two fillers.
  "after_drop": config_of(
    "gelu",
    gated=True,
    top_k=3,
    capacity=2,
    weighting="renormalized_after_drop",
    drop_order="token_major",
    grouping="fixed",
    group_size=4,
  ),
  "dropless_all_experts": config_of(
    "gelu", gated=False, top_k=E, weighting="softmax_selected", overflow="dropless"
  ),
  "max_score": config_of("silu", gated=False, top_k=2, capacity=2, priority="max_score"),
  "all_experts_one_slot": config_of("relu", gated=True, top_k=E, capacity=1),
  "weight_on_input": config_of(
    "silu", gated=True, top_k=2, capacity=2, score="sigmoid", weight_on="input", weight_scale=1.5
  ),
  "identity_experts": config_of(
    "gelu",
    gated=False,
    top_k=3,
    capacity=2,
    num_null_experts=2,
    null_expert="identity",
    weighting="renormalized",
    shared="add",
    grouping="sequence",
  ),
  "rerouted": config_of(
    "relu",
    gated=False,
    top_k=2,
    capacity=3,
    overflow="reroute",
    reroute_attempts=2,
    weighting="renormalized_after_drop",
    weight_norm_order=2.0,
    shared="gated",
    grouping="sequence",
  ),
  "rerouted_input": config_of(
    "silu",
    gated=True,
    top_k=1,
    capacity=3,
    overflow="reroute",
    weight_on="input",
    score="sqrt_softplus",
    shared="coefficient",
  ),
}


@pytest.mark.parametrize("form", list(Dispatch))
@pytest.mark.parametrize("name", CASES)
def test_layer_and_gradients_equal_the_oracle(name, form):
  _, state, x = split_layer(CASES[name])
  for mask_name in MASKS:
    run_and_compare(CASES[name], form, state, x, mask_name)


@pytest.mark.parametrize("form", list(Dispatch))
@pytest.mark.parametrize("name", ["one_choice", "two_choices", "max_score"])
def test_an_expert_that_nobody_asks_for_gets_exactly_no_gradient(name, form):
  _, state, x = split_layer(CASES[name])
  _, grads, _ = run_and_compare(CASES[name], form, without_expert(state, 2), x, "padding")
  for value in grads["experts"]["weights"].values():
    assert not np.any(value[2])
    assert np.any(np.delete(value, 2, axis=0))


@pytest.mark.parametrize("form", list(Dispatch))
@pytest.mark.parametrize("name", ["one_choice", "after_drop"])
def test_a_call_of_padding_alone_gives_exact_zeros(name, form):
  _, state, x = split_layer(CASES[name])
  mask = np.zeros((B, L), bool)
  result = compiled_layer(CASES[name], form)(state, x, mask, np.ones_like(x))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("name", ["one_choice", "after_drop", "all_experts_one_slot"])
def test_every_form_drops_the_same_tokens(name):
  _, state, x = split_layer(CASES[name])
  mask = np.ones((B, L), bool)
  zeros = []
  for form in Dispatch:
    y, _, _ = compiled_layer(CASES[name], form)(state, x, mask, np.ones_like(x))
    zeros.append(np.all(np.asarray(y) == 0.0, axis=-1))
  assert zeros[0].any()
  np.testing.assert_array_equal(zeros[0], zeros[1])
  np.testing.assert_array_equal(zeros[0], zeros[2])
