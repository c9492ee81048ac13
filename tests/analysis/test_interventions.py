"""Routing changed at evaluation: the best experts hidden, shared ones silent."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx

from moe_jax.analysis.interventions import interventions
from moe_jax.layers.attention_config import AttentionConfig
from moe_jax.models import ModelConfig, make_model
from moe_jax.moe import MoEConfig, RoutingConfig
from moe_jax.moe.registry import _SELECTORS

E = 8


def model_of(**changes):
  """Returns config, graph and variables of a model with two MoE layers."""
  moe = dict(hidden_dim=8, routing=RoutingConfig(num_experts=E, top_k=2)) | changes
  config = ModelConfig(
    vocab_size=32,
    model_dim=16,
    segments=(("attention:moe", 2),),
    attention=AttentionConfig(2, 2, 8),
    moe=MoEConfig(**moe),
  )
  graph, state = nnx.split(make_model(config, key=jax.random.key(0)))
  return config, state


def outputs(change, tokens):
  model = nnx.merge(nnx.split(make_model_shape(change.config))[0], change.model)
  return model(tokens, return_aux=True)


def make_model_shape(config):
  return nnx.eval_shape(lambda: make_model(config, key=jax.random.key(0)))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 16)))


def test_the_best_experts_are_hidden_and_the_names_forgotten():
  config, state = model_of()
  with interventions(config, state) as found:
    by_name = {change.name: change for change in found}
    wide = outputs(by_name["4 experts a token"], TOKENS)[1].plans[0]
    hidden = outputs(by_name["the best 2 experts of every token hidden"], TOKENS)[1].plans[0]
    ranks = np.asarray(wide.expert).reshape(-1, 4)
    np.testing.assert_array_equal(np.asarray(hidden.expert).reshape(-1, 2), ranks[:, 2:])
    assert "without_best_2" in _SELECTORS
  assert "without_best_2" not in _SELECTORS


def test_silent_shared_experts_leave_what_the_routed_ones_give():
  config, state = model_of(shared_hidden_dim=8)
  with interventions(config, state) as found:
    by_name = {change.name: change for change in found}
    silent = by_name["shared experts removed"]
    assert "shared experts removed, one more routed" in by_name
    got = outputs(silent, TOKENS)[0]
  plain, _ = model_of()
  without = {path: leaf for path, leaf in nnx.to_flat_state(state) if "shared" not in path}
  model = nnx.merge(
    nnx.split(make_model_shape(plain.dropless()))[0], nnx.from_flat_state(without.items())
  )
  np.testing.assert_allclose(got, model(TOKENS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("routing", "absent"),
  [
    (dict(selection="expert_choice", top_k=2, capacity_factor=1.0), "hidden|a token$|capacity"),
    (dict(selection="hash", top_k=1), "hidden|a token$"),
    (dict(selection="top_k", top_k=E), "hidden"),
  ],
)
def test_only_what_applies_is_offered(routing, absent):
  config, state = model_of(routing=RoutingConfig(num_experts=E, **routing))
  with interventions(config, state) as found:
    names = [change.name for change in found]
  assert not [name for name in names if re.search(absent, name)]
