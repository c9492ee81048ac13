"""Router state: updated once a step from all of it, and no part of what the optimiser sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from fast_compilation import compile_fast  # noqa: F401
from training import tiny
from training.steps import compiled_step, fresh, make_batch, one_step

from moe_jax.training.step import make_eval_step

DROPLESS = dict(
  moe__overflow="dropless",
  moe__dispatch="ragged",
  model__segments=(("attention:dense attention:moe", 2),),
)
LAYERS = (1, 3)


def experiment(**fields):
  return tiny.experiment(**DROPLESS | fields)


def uneven_batch():
  """The first half of the rows holds 9 real tokens a row, the other 27."""
  batch = make_batch()
  batch["segment_ids"][:2, 9:] = 0
  batch["loss_mask"][:2, 9:] = 0
  return batch


def router_arrays(state, name: str) -> np.ndarray:
  """Returns the variable of all MoE layers, stacked."""
  return np.asarray(
    state.router_state["segments"][0]["blocks"][1]["feed_forward"]["router"][name][...]
  )


def counts(metrics) -> np.ndarray:
  """Returns (MoE layers, E) how many assignments asked for each expert."""
  names = [f"moe/layer_{layer}/" for layer in LAYERS]
  return np.round([metrics[n + "load"] * metrics[n + "assignments"] for n in names])


@pytest.fixture(scope="module")
def biased():
  config = experiment(moe__bias_update="sign", moe__bias_rate=0.5)
  return one_step(config, uneven_batch())


def test_bias_follows_the_real_tokens_of_the_step(biased):
  state, metrics = biased
  load = counts(metrics)
  # 2 rows of 9 and 2 of 27 real tokens, one choice each.
  np.testing.assert_array_equal(load.sum(axis=1), [72, 72])
  expected = 0.5 * np.sign(load.mean(axis=1, keepdims=True) - load)
  np.testing.assert_array_equal(router_arrays(state, "bias"), expected)
  assert metrics["moe/bias_max"] == metrics["moe/layer_1/bias_max"] == 0.5


def test_bias_counts_each_token_once_under_accumulation_and_remat(biased):
  config = experiment(
    moe__bias_update="sign", moe__bias_rate=0.5, accumulation_steps=2, model__remat="full"
  )
  state, metrics = one_step(config, uneven_batch())
  np.testing.assert_array_equal(counts(metrics), counts(biased[1]))
  np.testing.assert_array_equal(router_arrays(state, "bias"), router_arrays(biased[0], "bias"))


def test_bias_is_unknown_to_the_optimiser(biased):
  state, metrics = biased
  plain, plain_metrics = one_step(experiment(), uneven_batch())
  for ours, theirs in ((state.params, plain.params), (state.opt_state, plain.opt_state)):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  # The bias was 0 in this step, so everything but the bias is that of a router without one.
  assert metrics["grad_norm"] == plain_metrics["grad_norm"]
  for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(plain.params), strict=True):
    np.testing.assert_array_equal(x, y)
  assert not jax.tree.leaves(plain.router_state)


def test_evaluation_reads_the_bias_and_leaves_it():
  config = experiment(moe__bias_update="sign")
  state, _ = compiled_step(config)
  # Towards one expert, by more than any difference of probabilities.
  bias = jax.tree.map(lambda b: b.at[:, 2].set(9.0), state.router_state)
  step = make_eval_step(config.model)
  batch = make_batch()
  plain = step(state.model, batch)
  pushed = step(dataclasses.replace(state, router_state=bias).model, batch)
  assert plain["nll"] != pushed["nll"]


def test_quantile_bias_averages_microbatches_by_their_tokens():
  settings = dict(moe__bias_update="quantile")
  batch = uneven_batch()
  whole, _ = one_step(experiment(accumulation_steps=2, **settings), batch)
  halves = [
    one_step(experiment(batch_size=2, **settings), {k: v[i : i + 2] for k, v in batch.items()})[0]
    for i in (0, 2)
  ]
  low, high = (router_arrays(state, "bias") for state in halves)
  np.testing.assert_allclose(router_arrays(whole, "bias"), (18 * low + 54 * high) / 72, rtol=1e-5)
  assert relative_error(low, high) > 0.01


@pytest.mark.parametrize("target, factor", [(1e-3, 2.0), (1e3, 0.5)])
def test_coefficient_of_the_balance_loss_follows_its_target(target, factor):
  config = experiment(
    moe__selection="positive",
    moe__score="relu",
    moe__adaptive_target=target,
    moe__adaptive_factor=2.0,
  )
  state, metrics = one_step(config, make_batch(), steps=2)
  np.testing.assert_array_equal(router_arrays(state, "balance_scale"), [factor**2] * 2)
  assert metrics["moe/balance_scale"] == factor**2


def test_coefficient_reaches_the_gradient():
  config = experiment(moe__adaptive_target=1.0, moe__adaptive_factor=2.0)
  state, step = compiled_step(config)
  norms = []
  for scale in (1.0, 1.0, 1000.0):
    scaled = jax.tree.map(lambda a, s=scale: jnp.full_like(a, s), state.router_state)
    norms.append(step(fresh(dataclasses.replace(state, router_state=scaled)), make_batch())[1])
  norms = [float(metrics["grad_norm"]) for metrics in norms]
  assert norms[0] == norms[1] < norms[2]
