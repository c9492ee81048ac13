"""Expert choice equals the loop over experts, and what flaxformer computed."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import ROUTING_MARGIN, relative_error, softmax
from moe.compiled import FAST_COMPILE, routed
from moe.plan_tensors import tensors
from oracles import whole_groups

from moe_jax.moe import RoutingConfig, route

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "gating"
# Sums of a few dozen float32 numbers, against float64.
TOLERANCE = 1e-5
# The files hold float32 results.
FIXTURE_TOLERANCE = 1e-6


def config_of(num_experts, capacity, **fields):
  return RoutingConfig(
    num_experts=num_experts, selection="expert_choice", capacity=capacity, **fields
  )


def draw_logits(seed, shape):
  """Returns logits (G, S, E) whose scores differ by a margin between the tokens of an expert."""
  generator = np.random.default_rng(seed)
  groups = []
  for _ in range(shape[0]):
    rows = []
    while len(rows) < shape[1]:
      rows.append(generator.normal(size=shape[2]).astype(np.float32))
      if shape[2] > 1 and np.min(np.diff(np.sort(softmax(rows), axis=0), axis=0), initial=1) <= (
        ROUTING_MARGIN
      ):
        rows.pop()
    groups.append(rows)
  return np.array(groups)


def masks(shape):
  """Returns masks (G, S) by name; the last group of `group` is padding alone."""
  real = np.ones(shape, bool)
  right, left, group = real.copy(), real.copy(), real.copy()
  right[-1, shape[1] // 2 :], left[0, : shape[1] // 3 + 1] = False, False
  group[-1] = False
  return {"none": real, "right": right, "left": left, "group": group, "all": ~real}


def inputs(seed, shape):
  """Returns logits by name: plain, equal for all, tied between tokens, an expert nobody wants."""
  plain = draw_logits(seed, shape)
  tied, empty = plain.copy(), plain.copy()
  tied[:, 1::2] = tied[:, : 2 * (shape[1] // 2) : 2]
  empty[..., -1] = -1e9
  return {"plain": plain, "equal": np.full_like(plain, 0.3), "tied": tied, "empty": empty}


def expected_groups(logits, mask, capacity, score="softmax"):
  pairs = zip(logits, mask, strict=True)
  return [
    whole_groups.expert_choice(rows, capacity=capacity, score=score, token_mask=mask_S)
    for rows, mask_S in pairs
  ]


def assert_plan(plan, groups, shape, capacity):
  both = [whole_groups.masks(group, shape[1:], capacity) for group in groups]
  dispatch, combine = tensors(plan)
  np.testing.assert_array_equal(dispatch, [dispatch for dispatch, _ in both])
  assert relative_error(combine, [combine for _, combine in both]) <= TOLERANCE


# G, S, E and C: one token, one expert, a slot for every token, E that does not divide S.
SHAPES = [(2, 1, 4, 1), (1, 5, 1, 2), (2, 6, 4, 6), (2, 7, 4, 2), (3, 12, 8, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plans_and_losses_equal_the_loops(shape):
  *shape, C = shape
  kinds = inputs(3, shape)
  cases = [("plain", name) for name in masks(shape[:2])] + [(kind, "right") for kind in kinds]
  for kind, name in cases:
    mask = masks(shape[:2])[name]
    plan = routed(kinds[kind], config_of(shape[-1], C), mask=mask, train=True)
    groups = expected_groups(kinds[kind], mask, C)
    assert_plan(plan, groups, shape, C)
    for loss, value in whole_groups.group_losses(kinds[kind], groups, token_mask=mask).items():
      assert relative_error(plan.losses[loss], value) <= TOLERANCE, (kind, name, loss)


def test_sigmoid_scores_and_a_weight_scale():
  logits, mask = draw_logits(5, (2, 6, 4)), np.ones((2, 6), bool)
  plan = routed(logits, config_of(4, 3, score="sigmoid", weight_scale=2.5))
  groups = expected_groups(logits, mask, 3, "sigmoid")
  for one in (one for group in groups for one in group):
    one.weight *= 2.5
  assert_plan(plan, groups, logits.shape, 3)


@pytest.mark.parametrize("top_k, capacity", [(1, 3), (2, 6), (4, 12)])
def test_top_k_sets_the_mean_number_of_experts_of_a_token(top_k, capacity):
  config = RoutingConfig(num_experts=4, top_k=top_k, selection="expert_choice", capacity_factor=1.0)
  plan = routed(draw_logits(1, (1, 12, 4)), config, train=True)
  assert plan.capacity == capacity
  assert float(plan.metrics["experts_per_token"]) == top_k


def test_a_bucket_is_rounded_after_the_factor():
  # 1.5 * 5 / 2 = 3.75 slots; 5 // 2 * 1.5 would be 3.
  config = RoutingConfig(num_experts=2, selection="expert_choice", capacity_factor=1.5)
  assert routed(draw_logits(1, (1, 5, 2)), config, train=True).capacity == 4


def test_metrics_count_tokens_that_no_expert_took():
  logits, mask = draw_logits(2, (2, 7, 4)), masks((2, 7))["right"]
  plan = routed(logits, config_of(4, 2), mask=mask)
  seen = np.any(tensors(plan)[0], axis=(2, 3))
  assert float(plan.metrics["unrouted_fraction"]) == pytest.approx(np.mean(~seen[mask]))
  # What an expert does not take was never asked for, so nothing is dropped.
  assert float(plan.metrics["dropped_fraction"]) == 0.0
  np.testing.assert_allclose(plan.metrics["load"], 0.25)


def test_padding_of_nan_reaches_no_value_and_no_gradient():
  logits = draw_logits(4, (2, 6, 4))

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  @jax.value_and_grad
  def total(logits, mask):
    plan = route(logits, config_of(4, 2), token_mask=mask, train=True)
    return jnp.sum(plan.combine_weights() ** 2) + sum(plan.losses.values())

  for mask in masks((2, 6)).values():
    clean, dirty = total(logits, mask), total(np.where(mask[..., None], logits, np.nan), mask)
    for actual, expected in zip(dirty, clean, strict=True):
      assert np.isfinite(actual).all()
      np.testing.assert_array_equal(actual, expected)
    assert not np.any(np.asarray(dirty[1])[~mask])


def fixtures():
  paths = sorted(FIXTURES.glob("experts_choose_*.npz"))
  assert len(paths) == 5
  return [pytest.param(path, id=path.stem) for path in paths]


@pytest.mark.parametrize("path", fixtures())
def test_equals_flaxformer_experts_choose(path):
  with np.load(path) as file:
    arrays = dict(file)
  sizes = dict(re.findall(r"([A-Z])(\d+)", path.stem))
  E, C = int(sizes["E"]), int(sizes["C"])
  plan = routed(arrays["logits"], config_of(E, C))
  dispatch, combine = tensors(plan)
  np.testing.assert_array_equal(dispatch, arrays["dispatch"].astype(bool))
  np.testing.assert_allclose(combine, arrays["combine"], rtol=0, atol=FIXTURE_TOLERANCE)
  groups = expected_groups(arrays["logits"], np.ones(arrays["logits"].shape[:2], bool), C)
  looped = [whole_groups.masks(group, dispatch.shape[1:3], C)[0] for group in groups]
  np.testing.assert_array_equal(looped, arrays["dispatch"].astype(bool))
