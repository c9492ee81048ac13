"""Router losses and metrics of a step do not depend on how it is cut, where they claim so."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from comparison import relative_error
from fast_compilation import compile_fast  # noqa: F401
from training.steps import fresh, initial_state, make_batch
from training.test_router_state import experiment, half, uneven_batch

from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import abstract_state
from moe_jax.training.step import make_train_step


@functools.cache
def router_gradient(scope: str, accumulation_steps: int):
  """Returns the router's gradient and the metrics; the balance loss outweighs the other."""
  config = experiment(
    moe__balance_scope=scope, moe__balance_loss_weight=100.0, accumulation_steps=accumulation_steps
  )
  optimizer = optax.sgd(1.0)
  before = initial_state(experiment())
  start = dataclasses.replace(before, opt_state=optimizer.init(before.params))
  after, metrics = make_train_step(config, optimizer)(fresh(start), uneven_batch())
  return of_router(before) - of_router(after), jax.device_get(metrics)


def of_router(state) -> np.ndarray:
  block = state.params["segments"][0]["blocks"][0]
  return np.array(block["feed_forward"]["router"]["kernel"].get_value())


def test_global_balance_loss_does_not_depend_on_accumulation():
  (whole, metrics), (cut, cut_metrics) = (
    router_gradient("batch", 1),
    router_gradient("global_batch", 4),
  )
  # The same float32 terms, added in another order.
  assert relative_error(cut, whole) < 1e-5
  for name in ("aux_loss", "z_loss", "loss"):
    assert relative_error(cut_metrics[name], metrics[name]) < 1e-6
  assert "moe/balance_load" not in cut_metrics


def test_balance_loss_of_a_microbatch_does():
  assert relative_error(router_gradient("batch", 4)[0], router_gradient("batch", 1)[0]) > 1e-2


class Tight(NamedTuple):
  """Metrics of steps with drops."""

  whole: dict  # of two unequal microbatches
  halves: list[dict]  # of each of them alone
  padded: dict  # of the whole, but the first microbatch is padding alone


@pytest.fixture(scope="module")
def tight():
  config = experiment(
    moe__overflow="drop", moe__capacity_factor=0.5, moe__importance_loss_weight=0.1
  )
  optimizer = make_optimizer(config.optimizer, config.steps)
  whole = make_train_step(dataclasses.replace(config, accumulation_steps=2), optimizer)
  alone = make_train_step(config, optimizer)

  def metrics(step, batch):
    return jax.device_get(step(fresh(initial_state(experiment())), batch)[1])

  batch, padded = uneven_batch(), uneven_batch()
  padded["segment_ids"][:2], padded["loss_mask"][:2] = 0, 0
  return Tight(
    whole=metrics(whole, batch),
    halves=[metrics(alone, half(batch, first)) for first in (0, 2)],
    padded=metrics(whole, padded),
  )


def test_metrics_of_a_step_are_ratios_of_sums(tight):
  weights = np.array([18, 54]) / 72
  for layer in (0, 1):
    for name in ("dropped_fraction", "experts_per_token", "router_confidence", "unrouted_fraction"):
      name = f"moe/layer_{layer}/{name}"
      expected = np.dot(weights, [metrics[name] for metrics in tight.halves])
      assert relative_error(tight.whole[name], expected) < 1e-5
  low, high = (metrics["moe/dropped_fraction"] for metrics in tight.halves)
  assert 0 <= low < high


def test_a_microbatch_of_padding_alone_changes_nothing(tight):
  for name in ("loss", "aux_loss", "z_loss", "grad_norm", "moe/router_confidence"):
    assert relative_error(tight.padded[name], tight.halves[1][name]) < 1e-5


def names(**fields) -> set[str]:
  """Returns the names of a step's metrics, without running it."""
  config = experiment(**fields)
  step = make_train_step(config, optax.sgd(1.0))
  return set(jax.eval_shape(step, abstract_state(config.model, optax.sgd(1.0)), make_batch())[1])


def test_losses_are_logged_where_they_count(tight):
  assert tight.whole["moe/importance_loss"] > 0
  assert "moe/load_loss" not in tight.whole
  assert "moe/load_loss" in names(moe__noise="gaussian", moe__load_loss_weight=0.1)


def test_soft_moe_has_no_balance_loss_to_log():
  soft = dict(moe__selection="soft", moe__dispatch="einsum", moe__overflow="drop")
  logged = names(**soft, moe__capacity=2, moe__balance_loss_weight=0.0)
  assert "z_loss" in logged and "aux_loss" not in logged
