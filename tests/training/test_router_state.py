"""Router state: updated once a step from all of it, and no part of what the optimiser sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from training.balanced_steps import (
  NUM_LAYERS,
  REAL,
  balanced,
  experiment,
  first_step,
  router_gradient,
  router_variable,
  uneven_batch,
)
from training.steps import compiled_step, fresh, make_batch

from moe_jax.planning.count import count_parameters
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.router_state import update_router_state
from moe_jax.training.state import abstract_state
from moe_jax.training.step import make_eval_step

CUT = dict(accumulation_steps=4, model__remat="full", moe__balance_scope="global_batch")


def counts(metrics) -> np.ndarray:
  """Returns (MoE layers, E) how many assignments asked for each expert."""
  names = [f"moe/layer_{layer}/" for layer in range(NUM_LAYERS)]
  return np.round([metrics[n + "load"] * metrics[n + "assignments"] for n in names])


def test_bias_follows_the_real_tokens_of_the_step():
  state, metrics = first_step()
  load = counts(metrics)
  np.testing.assert_array_equal(load.sum(axis=1), [REAL.sum()] * NUM_LAYERS)
  expected = 0.5 * np.sign(load.mean(axis=1, keepdims=True) - load)
  np.testing.assert_array_equal(router_variable(state, "bias"), expected)
  assert metrics["moe/bias_max"] == metrics["moe/layer_0/bias_max"] == 0.5


def test_each_token_counts_once_under_accumulation_and_remat():
  (whole, whole_metrics), (cut, cut_metrics) = first_step(), first_step(**CUT)
  np.testing.assert_array_equal(counts(cut_metrics), counts(whole_metrics))
  for name in ("bias", "balance_scale"):
    np.testing.assert_array_equal(router_variable(cut, name), router_variable(whole, name))


def test_coefficient_grows_above_its_target_and_reaches_the_gradient():
  state, metrics = first_step()
  np.testing.assert_allclose(router_variable(state, "balance_scale"), [1.2, 1.2], rtol=1e-6)
  assert metrics["moe/balance_scale"] == pytest.approx(1.2)
  start, step = compiled_step(balanced())
  none = jax.tree.map(jnp.zeros_like, start.router_state)
  plain, _ = step(fresh(dataclasses.replace(start, router_state=none)), uneven_batch())
  difference = np.abs(router_gradient(plain) - router_gradient(state))
  assert difference.max() > 0.1 * np.abs(router_gradient(state)).max()


def fake_state(config):
  shapes = abstract_state(config.model, make_optimizer(config.optimizer, 5)).router_state
  return jax.tree.map(lambda a: jnp.ones(a.shape), shapes)


def test_the_coefficient_of_a_variable_router_follows_what_tokens_ask_for():
  config = experiment(
    moe__selection="positive", moe__score="relu", moe__top_k=2, moe__adaptive_target=2.0
  )
  # 3 and 1 experts asked for by each of 10 tokens; max violation points the other way.
  layers = [
    {"assignments": jnp.float32(30), "max_violation": jnp.float32(0)},
    {"assignments": jnp.float32(10), "max_violation": jnp.float32(9)},
  ]
  new = update_router_state(fake_state(config), layers, [jnp.int32(10)] * 2, config.model)
  (scale,) = jax.tree.leaves(new)
  np.testing.assert_allclose(scale, [1.2, 1 / 1.2], rtol=1e-6)


def test_quantile_bias_becomes_the_target_of_a_step_with_tokens():
  config = experiment(moe__bias_update="quantile")
  target = jnp.arange(4.0)
  layers = [{"assignments": jnp.float32(n), "bias_target": target} for n in (0, 10)]
  new = update_router_state(fake_state(config), layers, [jnp.int32(10)] * 2, config.model)
  np.testing.assert_array_equal(jax.tree.leaves(new)[0], [np.ones(4), target])


def test_router_state_is_unknown_to_the_optimiser():
  with_state, without = (
    abstract_state(config.model, make_optimizer(config.optimizer, 5))
    for config in (balanced(), experiment(optimizer__clip_norm=0.0))
  )
  assert len(jax.tree.leaves(with_state.router_state)) == 2
  assert not jax.tree.leaves(without.router_state)
  for name in ("params", "opt_state"):
    ours, theirs = getattr(with_state, name), getattr(without, name)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  sizes = sum(leaf.size for leaf in jax.tree.leaves(with_state.params))
  assert sizes == count_parameters(balanced().model).total


def test_evaluation_reads_the_bias():
  config = balanced()
  state, _ = compiled_step(config)
  # Towards one expert, by more than any difference of probabilities.
  bias = jax.tree.map(lambda a: a.at[:, 2].set(9.0) if a.ndim == 2 else a, state.router_state)
  step = make_eval_step(config.model)
  losses = [
    float(step(dataclasses.replace(state, router_state=s).model, make_batch())["nll"])
    for s in (state.router_state, bias)
  ]
  assert losses[0] != losses[1]
