"""Router state: updated once a step from all of it, and no part of what the optimiser sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from training import tiny
from training.steps import compiled_step, fresh, make_batch, one_step

from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.router_state import update_router_state
from moe_jax.training.state import abstract_state, model_graph
from moe_jax.training.step import make_eval_step, run_batch

LAYERS = (0, 1)
BALANCED = dict(moe__bias_update="sign", moe__bias_rate=0.5, moe__adaptive_target=1e-3)


def experiment(**fields):
  return tiny.experiment(
    **dict(model__segments=(("attention:moe", 2),), moe__overflow="dropless") | fields
  )


def uneven_batch():
  """The first half of the rows holds 9 real tokens a row, the other 27."""
  batch = make_batch()
  batch["segment_ids"][:2, 9:] = 0
  batch["loss_mask"][:2, 9:] = 0
  return batch


def half(batch, first: int):
  return {name: value[first : first + 2] for name, value in batch.items()}


def router_arrays(state, name: str) -> np.ndarray:
  """Returns the variable of all MoE layers, stacked."""
  router = state.router_state["segments"][0]["blocks"][0]["feed_forward"]["router"]
  return np.asarray(router[name].get_value())


def counts(metrics) -> np.ndarray:
  """Returns (MoE layers, E) how many assignments asked for each expert."""
  names = [f"moe/layer_{layer}/" for layer in LAYERS]
  return np.round([metrics[n + "load"] * metrics[n + "assignments"] for n in names])


@pytest.fixture(scope="module")
def whole():
  return one_step(experiment(**BALANCED), uneven_batch())


def test_bias_follows_the_real_tokens_of_the_step(whole):
  state, metrics = whole
  load = counts(metrics)
  # 2 rows of 9 and 2 of 27 real tokens, one choice each.
  np.testing.assert_array_equal(load.sum(axis=1), [72, 72])
  expected = 0.5 * np.sign(load.mean(axis=1, keepdims=True) - load)
  np.testing.assert_array_equal(router_arrays(state, "bias"), expected)
  assert metrics["moe/bias_max"] == metrics["moe/layer_0/bias_max"] == 0.5


def test_each_token_counts_once_under_accumulation_and_remat(whole):
  cut = one_step(experiment(accumulation_steps=2, model__remat="full", **BALANCED), uneven_batch())
  np.testing.assert_array_equal(counts(cut[1]), counts(whole[1]))
  for name in ("bias", "balance_scale"):
    np.testing.assert_array_equal(router_arrays(cut[0], name), router_arrays(whole[0], name))


def test_coefficient_grows_above_its_target_and_reaches_the_gradient(whole):
  np.testing.assert_allclose(router_arrays(whole[0], "balance_scale"), [1.2, 1.2], rtol=1e-6)
  assert whole[1]["moe/balance_scale"] == pytest.approx(1.2)
  state, step = compiled_step(experiment(**BALANCED))
  scaled = jax.tree.map(lambda a: 100.0 * jnp.ones_like(a), state.router_state)
  _, metrics = step(fresh(dataclasses.replace(state, router_state=scaled)), uneven_batch())
  assert metrics["grad_norm"] > whole[1]["grad_norm"]


def test_the_coefficient_of_a_variable_router_follows_what_tokens_ask_for():
  config = experiment(
    moe__selection="positive", moe__score="relu", moe__top_k=2, moe__adaptive_target=2.0
  )
  state = jax.tree.map(
    lambda a: jnp.ones(a.shape),
    abstract_state(config.model, make_optimizer(config.optimizer, 5)).router_state,
  )
  # 3 and 1 experts asked for by each of 10 tokens; max violation points the other way.
  layers = [
    {"assignments": jnp.float32(30), "max_violation": jnp.float32(0)},
    {"assignments": jnp.float32(10), "max_violation": jnp.float32(9)},
  ]
  (scale,) = jax.tree.leaves(update_router_state(state, layers, jnp.int32(10), config.model))
  np.testing.assert_allclose(scale, [1.2, 1 / 1.2], rtol=1e-6)


def test_router_state_is_unknown_to_the_optimiser():
  with_state, without = (
    abstract_state(c.model, make_optimizer(c.optimizer, 5))
    for c in (experiment(**BALANCED), experiment())
  )
  assert len(jax.tree.leaves(with_state.router_state)) == 2
  assert not jax.tree.leaves(without.router_state)
  for name in ("params", "opt_state"):
    ours, theirs = getattr(with_state, name), getattr(without, name)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


def test_evaluation_reads_the_bias_and_leaves_it():
  config = experiment(**BALANCED)
  state, _ = compiled_step(config)
  # Towards one expert, by more than any difference of probabilities.
  bias = jax.tree.map(lambda a: a.at[:, 2].set(9.0) if a.ndim == 2 else a, state.router_state)
  step = make_eval_step(config.model)
  losses = [
    float(step(dataclasses.replace(state, router_state=s).model, make_batch())["nll"])
    for s in (state.router_state, bias)
  ]
  assert losses[0] != losses[1]


def test_quantile_bias_averages_microbatches_by_their_tokens():
  config = experiment(moe__bias_update="quantile", accumulation_steps=2)
  batch = uneven_batch()
  after, metrics = one_step(config, batch)
  assert "moe/bias_target" not in metrics
  graph, start = model_graph(config.model), compiled_step(config)[0].model

  @jax.jit
  def targets(batch):
    _, aux = run_batch(nnx.merge(graph, start), batch, train=True)
    return jnp.stack([plan.metrics["bias_target"] for plan in aux.plans])

  low, high = (targets(half(batch, first)) for first in (0, 2))
  np.testing.assert_allclose(router_arrays(after, "bias"), (18 * low + 54 * high) / 72, rtol=1e-5)
  assert relative_error(low, high) > 0.01
