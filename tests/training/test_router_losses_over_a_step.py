"""Router losses and metrics of a step do not depend on how it is cut, where they claim so."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from comparison import relative_error
from fast_compilation import compile_fast  # noqa: F401
from training import tiny
from training.steps import make_batch, one_step
from training.test_router_state import DROPLESS, experiment, uneven_batch

from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step


@functools.cache
def gradient(scope: str, accumulation_steps: int, **moe):
  """Returns metrics and the gradient, with a balance loss that outweighs the language model's."""
  config = experiment(
    moe__balance_scope=scope,
    moe__balance_loss_weight=100.0,
    moe__top_k=2,
    moe__weighting="renormalized",
    accumulation_steps=accumulation_steps,
    **moe,
  )
  optimizer = optax.sgd(1.0)
  before = init_state(config.model, optimizer, 0)
  after, metrics = make_train_step(config, optimizer)(jax.tree.map(np.copy, before), uneven_batch())
  difference = jax.tree.map(lambda a, b: np.asarray(a - b), before.params, after.params)
  return difference["segments"][0]["blocks"][1]["feed_forward"]["router"]["kernel"][...], metrics


@pytest.mark.parametrize(
  "conventions",
  [
    dict(moe__balance_fraction="first_choice"),
    dict(moe__balance_fraction="all_choices_mean", moe__balance_source="dispatch"),
    dict(moe__balance_fraction="all_choices", moe__loss_padding="flaxformer"),
  ],
  ids=lambda c: "-".join(c.values()),
)
def test_global_balance_loss_does_not_depend_on_accumulation(conventions):
  (whole, metrics), (cut, cut_metrics) = (
    gradient("global_batch", steps, **conventions) for steps in (1, 4)
  )
  # The same float32 terms, added in another order.
  assert relative_error(cut, whole) < 1e-5
  assert relative_error(cut_metrics["aux_loss"], metrics["aux_loss"]) < 1e-6
  assert relative_error(cut_metrics["z_loss"], metrics["z_loss"]) < 1e-6


def test_balance_loss_of_a_microbatch_does():
  (whole, _), (cut, _) = (gradient("batch", steps) for steps in (1, 4))
  assert relative_error(cut, whole) > 1e-2


def test_global_balance_loss_of_one_microbatch_is_that_of_the_batch():
  ours, theirs = gradient("global_batch", 1)[0], gradient("batch", 1)[0]
  np.testing.assert_array_equal(ours, theirs)


def test_metrics_of_a_step_are_ratios_of_sums():
  batch = uneven_batch()
  config = tiny.experiment(moe__capacity_factor=0.5, batch_size=2)
  halves = [
    one_step(config, {name: value[i : i + 2] for name, value in batch.items()})[1] for i in (0, 2)
  ]
  _, whole = one_step(dataclasses.replace(config, batch_size=4, accumulation_steps=2), batch)
  weights = np.array([18, 54]) / 72
  for layer in config.model.moe_layers():
    for name in ("dropped_fraction", "experts_per_token", "router_confidence", "unrouted_fraction"):
      name = f"moe/layer_{layer}/{name}"
      expected = np.dot(weights, [half[name] for half in halves])
      assert relative_error(whole[name], expected) < 1e-5
  name = "moe/layer_1/dropped_fraction"
  assert halves[0][name] != halves[1][name] and whole[name] > 0


def test_a_microbatch_of_padding_alone_changes_no_router_loss():
  batch = make_batch()
  batch["segment_ids"][2:], batch["loss_mask"][2:] = 0, 0
  half = {name: value[:2] for name, value in batch.items()}
  _, whole = one_step(tiny.experiment(accumulation_steps=2), batch)
  _, alone = one_step(tiny.experiment(batch_size=2), half)
  for name in ("loss", "aux_loss", "z_loss", "grad_norm", "moe/router_confidence"):
    assert relative_error(whole[name], alone[name]) < 1e-5


def test_importance_and_load_losses_are_logged_where_they_count():
  _, metrics = one_step(experiment(), make_batch())
  assert not {"moe/importance_loss", "moe/load_loss"} & set(metrics)
  config = tiny.experiment(
    **DROPLESS,
    moe__noise="gaussian",
    moe__importance_loss_weight=0.1,
    moe__load_loss_weight=0.1,
  )
  _, metrics = one_step(config, make_batch())
  assert metrics["moe/importance_loss"] >= 0 and metrics["moe/load_loss"] >= 0


def test_soft_moe_has_no_balance_loss_to_log():
  config = experiment(
    moe__selection="soft",
    moe__dispatch="einsum",
    moe__overflow="drop",
    moe__capacity=2,
    moe__balance_loss_weight=0.0,
  )
  _, metrics = one_step(config, make_batch())
  assert "aux_loss" not in metrics and np.isfinite(metrics["loss"])
