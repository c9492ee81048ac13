"""Router losses and metrics of a step do not depend on how it is cut, where they claim so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import relative_error
from fast_compilation import compile_fast  # noqa: F401
from training import tiny
from training.balanced_steps import experiment, first_step, router_gradient
from training.steps import make_batch, one_step
from training.test_router_state import CUT

from moe_jax.moe import RoutingConfig, route
from moe_jax.moe.metrics import max_violation_floor
from moe_jax.training.layer_metrics import ratios, summands
from moe_jax.training.microbatches import cut, sum_over
from moe_jax.training.state import abstract_state
from moe_jax.training.step import make_train_step

# Two devices of two experts; a token visits one.
OVER_DEVICES = dict(
  moe__num_expert_groups=2, moe__device_loss_weight=10.0, moe__communication_loss_weight=10.0
)


def test_global_balance_losses_do_not_depend_on_accumulation():
  whole, whole_metrics = first_step(**OVER_DEVICES)
  parts, metrics = first_step(**CUT | OVER_DEVICES)
  # The same float32 terms, added in another order.
  assert relative_error(router_gradient(parts), router_gradient(whole)) < 1e-5
  names = ("aux_loss", "z_loss", "loss", "grad_norm", "moe/router_confidence")
  for name in (*names, "moe/device_balance_loss", "moe/communication_loss"):
    assert relative_error(metrics[name], whole_metrics[name]) < 1e-5
  assert "moe/balance_load" not in metrics


def test_balance_loss_of_a_microbatch_does():
  parts, _ = first_step(**CUT | OVER_DEVICES | {"moe__balance_scope": "batch"})
  whole, _ = first_step(**OVER_DEVICES)
  assert relative_error(router_gradient(parts), router_gradient(whole)) > 1e-2


ROUTING = RoutingConfig(
  num_experts=4,
  top_k=2,
  # Microbatches differ in assignments per token, too.
  selection="threshold_second",
  second_threshold=0.3,
  bias_update="quantile",
  balance_scope="global_batch",
  capacity=3,
  grouping="sequence",
)
# Tokens of four rows, two microbatches; a third of padding alone.
REAL = np.array([2, 5, 8, 8, 0, 0])


@pytest.fixture(scope="module")
def routed():
  """Returns what is summed over three microbatches, and the metrics of each by itself."""
  mask = np.arange(8) < REAL[:, None]
  logits = np.random.default_rng(0).normal(size=(6, 8, 4)).astype(np.float32)
  batch = {"segment_ids": mask.astype(np.int32), "logits": logits}

  @jax.jit
  def metrics(part):
    mask = part["segment_ids"] > 0
    plan = route(part["logits"], ROUTING, token_mask=mask, bias=jnp.zeros(4), train=True)
    return plan.metrics

  parts = cut(batch, jax.random.key(0), 3, ROUTING)
  summed = sum_over(lambda part, key, share: summands(metrics(part), share), parts)
  own = [metrics({name: a[i : i + 2] for name, a in batch.items()}) for i in (0, 2, 4)]
  return ratios(summed), own, metrics(batch)


def test_metrics_of_a_step_are_ratios_of_sums(routed):
  step, _, whole = routed
  # A group is a sequence, so cutting the batch drops no other token.
  # The slots of the microbatch without tokens are nobody's, but in a batch they are some group's.
  for name in whole.keys() - {"max_violation_floor", "bias_target", "slots_per_assignment"}:
    np.testing.assert_allclose(step[name], whole[name], rtol=1e-5, err_msg=name)
  assert step["dropped_fraction"] > 0
  np.testing.assert_allclose(step["slots_per_assignment"], 4 * 2 * 2 * 3 / 46, rtol=1e-6)


def test_quantile_bias_is_the_mean_of_the_microbatches_weighted_by_tokens(routed):
  step, own, _ = routed
  low, high, _ = (metrics["bias_target"] for metrics in own)
  np.testing.assert_allclose(step["bias_target"], (7 * low + 16 * high) / 23, rtol=1e-5)
  assert relative_error(low, high) > 0.01


def names(**fields) -> set[str]:
  """Returns the names of a step's metrics, without running it."""
  config = experiment(**fields)
  step = make_train_step(config, optax.sgd(1.0))
  state = abstract_state(config.model, optax.sgd(1.0))
  return set(jax.eval_shape(step, state, make_batch())[1])


def test_losses_are_logged_where_they_count():
  noisy = dict(moe__noise="gaussian", moe__load_loss_weight=0.1, moe__importance_loss_weight=0.1)
  own = {"moe/importance_loss", "moe/load_loss"}
  assert own <= names(**noisy)
  assert not own & set(first_step(**OVER_DEVICES)[1])


def test_soft_moe_has_no_balance_loss_to_log():
  soft = dict(moe__selection="soft", moe__dispatch="einsum", moe__overflow="drop")
  logged = names(**soft, moe__capacity=2, moe__balance_loss_weight=0.0)
  assert "z_loss" in logged and "aux_loss" not in logged


def pairs(**fields):
  """Returns a small dropless encoder-decoder, balanced over whole steps."""
  whole = dict(moe__overflow="dropless", moe__balance_scope="global_batch")
  return tiny.pair_experiment(**whole, optimizer__clip_norm=0.0, **fields)


def uneven_pairs():
  """Returns pairs of which the first two have little in the decoder, and all in the encoder."""
  batch = make_batch()
  source = np.arange(32) < np.array([32, 30, 6, 9])[:, None]
  own = np.arange(32) < np.array([3, 5, 32, 32])[:, None]
  batch |= {"source_tokens": batch["targets"], "source_segment_ids": source.astype(np.int32)}
  return batch | {"segment_ids": own.astype(np.int32), "loss_mask": own.astype(np.int32)}


def test_an_encoders_losses_weigh_microbatches_by_its_own_tokens():
  config, batch = pairs(), uneven_pairs()
  _, whole_metrics = one_step(config, batch)
  _, metrics = one_step(dataclasses.replace(config, accumulation_steps=2), batch)
  for name in ("loss", "aux_loss", "z_loss", "grad_norm", "moe/layer_0/router_confidence"):
    assert relative_error(metrics[name], whole_metrics[name]) < 1e-5, name


def test_a_layer_of_a_pair_is_measured_by_the_tokens_it_sees():
  asks = dict(selection="positive", score="relu", top_k=1, adaptive_target=1.0, num_experts=4)
  config = pairs(**{f"moe__{name}": value for name, value in asks.items()})
  batch = uneven_pairs()
  state, metrics = one_step(config, batch)
  for layer, field, part in ((0, "source_segment_ids", "encoder"), (1, "segment_ids", "decoder")):
    own = f"moe/layer_{layer}/"
    assert metrics[own + "max_violation_floor"] == np.float32(max_violation_floor(4 * 32, 4))
    above = metrics[own + "assignments"] > batch[field].sum()
    (scale,) = jax.tree.leaves(state.router_state[part])
    np.testing.assert_allclose(scale, [1.2 if above else 1 / 1.2], rtol=1e-6)
