"""Counts of routing add up, and their ratios are the metrics."""

import dataclasses
import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis import counted
from analysis.counted import E, K, assert_counts_equal, draw_call
from comparison import draw_logits
from fast_compilation import compile_fast  # noqa: F401
from moe.compiled import routed
from oracles import router_metrics

from moe_jax.analysis.routing_counts import RoutingCounts, count_plan, count_routing, finish
from moe_jax.errors import UserError
from moe_jax.moe import RoutingConfig, RoutingPlan

count = jax.jit(count_routing, static_argnames="num_slots")
count_jitted_plan = jax.jit(count_plan)
G, S = 2, 24


@functools.cache
def routed_call():
  """Returns a plan with drops and padding, its logits, probabilities and mask."""
  logits = draw_logits(0, (G, S, E))
  mask = np.random.default_rng(0).random((G, S)) < 0.8
  config = RoutingConfig(num_experts=E, top_k=K, capacity=7)
  return routed(logits, config, mask=mask), logits, jax.nn.softmax(logits, axis=-1), mask


def test_ratios_agree_with_the_metrics_of_the_routing_core():
  plan, logits, probs, mask = routed_call()
  found = finish(count_jitted_plan(plan, probs, logits, mask))
  shared = found.keys() & plan.metrics.keys()
  assert len(shared) == 11
  for name in shared:
    np.testing.assert_allclose(found[name], plan.metrics[name], rtol=1e-5, err_msg=name)
  assert found["dropped_fraction"] > 0
  np.testing.assert_allclose(found["router_z"], plan.losses["router_z"], rtol=1e-5)
  by_choice = found["dropped_fraction_by_choice"]
  assert by_choice[0] < found["dropped_fraction"] < by_choice[1]


def test_scores_equal_loops():
  expert, asked, kept, probs, logits, mask = draw_call()
  found = finish(count(expert, asked, kept, probs, logits, mask, num_slots=50))
  rows = probs[mask].astype(np.float64)
  ranked = np.sort(rows, axis=1)[:, ::-1]
  local = np.mean([router_metrics.entropy(row) for row in rows])
  overall = router_metrics.entropy(rows.sum(axis=0))
  importance = [rows[np.any(expert[mask] == e, axis=1), e].sum() for e in range(E)]
  first = np.bincount(expert[mask, 0], minlength=E)
  expected = {
    "top_margin": np.mean(ranked[:, 0] - ranked[:, 1]),
    "chosen_mass": np.mean(ranked[:, :K].sum(axis=1)),
    "token_entropy": local,
    "expert_entropy": overall,
    "routing_information": overall - local,
    "importance_cv": router_metrics.coefficient_of_variation(importance),
    "balance_loss_first_choice": E * np.dot(first, rows.sum(axis=0)) / len(rows) ** 2,
    "unrouted_fraction": np.mean(~kept[mask].any(axis=1)),
    "load_cv_floor": math.sqrt((E - 1) / asked.sum()),
  }
  for name, value in expected.items():
    # The information is the difference of two entropies ten times as large.
    np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_parts_add_up_to_the_whole_in_any_order():
  call = draw_call()
  whole = count(*call, num_slots=96)
  a, b, c = (count(*(x[cut] for x in call), num_slots=32) for cut in _cuts(len(call[0])))
  for total in ((a + b) + c, a + (b + c), c + a + b, RoutingCounts.zeros(E, K) + a + b + c):
    assert_counts_equal(total, whole)


def _cuts(length):
  return slice(0, 16), slice(16, 32), slice(32, length)


def test_ratios_come_after_the_sum():
  # Each microbatch sends all tokens to one expert, another one each time: the step is balanced.
  nothing = RoutingCounts.zeros(E, K)
  parts = [dataclasses.replace(nothing, asked=jnp.eye(E, dtype=jnp.int32)[e]) for e in range(E)]
  assert finish(parts[0])["max_violation"] == E - 1
  assert finish(sum(parts, nothing))["max_violation"] == 0.0


def test_devices_sum_to_the_whole():
  # Devices are counted once, when jax starts, so other ones need another process.
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  folders = [path for path in sys.path if path]
  environment = os.environ | flags | {"PYTHONPATH": os.pathsep.join(folders)}
  command = [sys.executable, counted.__file__]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr


def test_padding_and_gradients_reach_nothing():
  expert, asked, kept, probs, logits, mask = draw_call()
  clean = count(expert, asked, kept, probs, logits, mask, num_slots=50)
  spoilt = [np.where(mask[:, None], a, np.nan) for a in (probs, logits)]
  everything = np.ones_like(asked)
  ids = np.where(mask[:, None], expert, -1)
  assert_counts_equal(
    count(ids, everything, kept | ~mask[:, None], *spoilt, mask, num_slots=50), clean
  )

  def total(probs, logits):
    counts = count_routing(expert, asked, kept, probs, logits, mask, 50)
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(counts) if leaf.dtype == jnp.float32)

  for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(probs, logits):
    assert not np.any(gradient)


def test_largest_logit_is_bounded_by_a_power_of_two():
  for largest, bound in ((0.0, 1), (0.5, 1), (1.0, 2), (-5.0, 8), (16383.0, 16384)):
    assert _bound_of(largest) == bound
  assert _bound_of(16384.0) == _bound_of(np.nan) == np.inf
  assert finish(RoutingCounts.zeros(E, K))["max_abs_logit_bound"] == 0.0


def _bound_of(value):
  expert, asked, kept, probs, logits, mask = draw_call(num_tokens=6)
  logits = np.zeros_like(logits)
  logits[np.argmax(mask), 1] = value
  return finish(count(expert, asked, kept, probs, logits, mask, num_slots=5))["max_abs_logit_bound"]


def test_no_token_gives_zeros_and_dead_experts():
  found = finish(RoutingCounts.zeros(E, K))
  ones = {"max_over_mean_load", "effective_experts"}
  for name, value in found.items():
    expected = {"dead_experts": E, "starved_experts": E}.get(name, float(name in ones))
    np.testing.assert_array_equal(value, np.full(value.shape, expected), err_msg=name)
    assert value.dtype == jnp.float32


def expert_choice_plan():
  """Returns three tokens, of which two experts of two slots take 0 and 1, and 0 and padding 2."""
  row = functools.partial(jnp.array, dtype=jnp.int32)
  return RoutingPlan(
    token=row([[0, 1, 0, 2]]),
    expert=row([[0, 0, 1, 1]]),
    slot=row([[0, 1, 0, 1]]),
    weight=jnp.ones((1, 4)),
    valid=jnp.array([[True, True, True, False]]),
    identity=None,
    losses={},
    metrics={},
    num_tokens=3,
    num_experts=2,
    capacity=2,
  )


def test_plans_in_which_experts_choose_are_counted_by_token():
  probs = jnp.array([[[0.7, 0.3], [0.6, 0.4], [0.5, 0.5]]])
  mask = jnp.array([[True, True, False]])
  counts = count_jitted_plan(expert_choice_plan(), probs, jnp.log(probs), mask)
  np.testing.assert_array_equal(counts.asked, [2, 1])
  np.testing.assert_array_equal(counts.first, [2, 0])
  np.testing.assert_array_equal(counts.experts_per_token, [0, 1, 1, 0, 0])
  np.testing.assert_allclose(counts.importance, [1.3, 0.3], rtol=1e-6)
  found = finish(counts)
  assert found["dropped_fraction"] == found["dropped_token_fraction"] == 0.0
  np.testing.assert_allclose(found["capacity_utilization"], 3 / 4)


def test_probabilities_of_another_plan_are_refused():
  plan, logits, probs, mask = routed_call()
  with pytest.raises(UserError, match=r"probs have shape \(2, 20, 4\); expected \(2, 24, 4\)"):
    count_plan(plan, probs[:, :20], logits[:, :20], mask[:, :20])
