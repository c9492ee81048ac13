"""Sinkhorn and BASE: token choices balanced over a whole group in training."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from comparison import ROUTING_MARGIN, draw_logits, relative_error
from moe.compiled import FAST_COMPILE, routed
from moe.plan_tensors import tensors
from oracles import routing, whole_groups

from moe_jax.moe import RoutingConfig, route
from moe_jax.moe.assignment import balanced_assignment

TOLERANCE = 1e-5
ITERATIONS = 8


def config_of(selection, num_experts, **fields):
  fields = {"capacity_factor": 1.0, "sinkhorn_iterations": ITERATIONS, **fields}
  return RoutingConfig(num_experts=num_experts, selection=selection, **fields)


def masks(shape):
  real = np.ones(shape, bool)
  right, group = real.copy(), real.copy()
  right[-1, shape[1] // 2 :], group[-1] = False, False
  return {"none": real, "right": right, "group": group, "all": ~real}


def sinkhorn_logits(seed, shape, mask_names=("none", "right")):
  """Returns logits whose balanced matrix decides every token by a margin, under every mask."""
  generator = np.random.default_rng(seed)
  for _ in range(200):
    # A common preference: plain top-1 would crowd the last expert.
    logits = generator.normal(size=shape) + np.linspace(0, 1.5, shape[2])
    logits = logits.astype(np.float32)
    if min(sinkhorn_margin(logits, masks(shape[:2])[n]) for n in mask_names) > ROUTING_MARGIN:
      return logits
  raise AssertionError("no logits with margins found")


def sinkhorn_margin(logits, mask):
  best = []
  for rows, mask_S in zip(logits, mask, strict=True):
    matrix = whole_groups.sinkhorn_matrix(rows, iterations=ITERATIONS, token_mask=mask_S)
    two = np.sort(matrix[mask_S], axis=1)[:, -2:]
    best += list((two[:, 1] - two[:, 0]) / two[:, 1]) if two.shape[1] == 2 else []
  return min(best, default=math.inf)


def expected_groups(logits, mask, experts, capacity):
  """Returns the assignments of each group whose tokens ask for `experts` (G, S)."""
  groups = []
  for rows, mask_S, experts_S in zip(logits, mask, experts, strict=True):
    scores = whole_groups.scores_of(rows, "softmax")
    groups.append(
      whole_groups.one_expert_each(experts_S, scores, capacity=capacity, token_mask=mask_S)
    )
  return groups


def assert_plan(plan, groups, logits, mask):
  both = [whole_groups.masks(group, logits.shape[1:], plan.capacity) for group in groups]
  dispatch, combine = tensors(plan)
  np.testing.assert_array_equal(dispatch, [dispatch for dispatch, _ in both])
  assert relative_error(combine, [combine for _, combine in both]) <= TOLERANCE
  for name, value in whole_groups.group_losses(logits, groups, token_mask=mask).items():
    assert relative_error(plan.losses[name], value) <= TOLERANCE, name


def best_experts(logits):
  return [[routing.top_experts(row, 1)[0] for row in rows] for rows in logits]


def sinkhorn_choice(logits, mask):
  pairs = zip(logits, mask, strict=True)
  return best_experts(
    [whole_groups.sinkhorn_matrix(a, iterations=ITERATIONS, token_mask=m) for a, m in pairs]
  )


# One token, one expert, E that divides S, and E that does not.
SHAPES = [(2, 1, 4), (1, 5, 1), (2, 8, 4), (2, 11, 4)]


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_sinkhorn_equals_the_matrix_scaling(shape):
  logits = sinkhorn_logits(0, shape)
  for kind, name in [("plain", n) for n in masks(shape[:2])] + [("equal", "right")]:
    mask = masks(shape[:2])[name]
    given = logits if kind == "plain" else np.full_like(logits, 0.3)
    plan = routed(given, config_of("sinkhorn", shape[2]), mask=mask, train=True)
    experts = sinkhorn_choice(given, mask)
    assert_plan(plan, expected_groups(given, mask, experts, plan.capacity), given, mask)


def test_sinkhorn_leaves_a_token_alone_with_any_expert():
  # Balance makes the only token want all experts alike: rounding decides, and the rest follows.
  logits, mask = draw_logits(0, (2, 1, 4)), np.ones((2, 1), bool)
  plan = routed(logits, config_of("sinkhorn", 4), train=True)
  assert_plan(plan, expected_groups(logits, mask, plan.expert, 1), logits, mask)


def test_sinkhorn_spreads_what_top_1_crowds():
  logits = sinkhorn_logits(1, (1, 32, 4), ("none",))
  train, evaluate = (
    routed(logits, config_of("sinkhorn", 4, overflow="dropless"), train=t) for t in (True, False)
  )
  assert np.max(train.metrics["load"]) < 0.4 < np.max(evaluate.metrics["load"])


@pytest.mark.parametrize("selection", ["sinkhorn", "base"])
@pytest.mark.parametrize("shape", [(2, 11, 4)], ids=str)
def test_outside_training_every_token_takes_its_best_expert(selection, shape):
  logits, mask = draw_logits(2, shape), masks(shape[:2])["right"]
  plan = routed(logits, config_of(selection, shape[2], overflow="dropless"), mask=mask)
  assert_plan(plan, expected_groups(logits, mask, best_experts(logits), shape[1]), logits, mask)


@functools.cache
def assign():
  return jax.jit(balanced_assignment, compiler_options=FAST_COMPILE)


def best_total(score_SE, slots):
  """Returns the largest sum of scores with at most `slots` tokens an expert."""
  copies = np.repeat(np.float64(score_SE), slots, axis=1)
  tokens, columns = scipy.optimize.linear_sum_assignment(copies, maximize=True)
  return copies[tokens, columns].sum()


KINDS = {
  "plain": lambda generator, shape: generator.normal(size=shape),
  "crowded": lambda generator, shape: generator.normal(size=shape) + np.arange(shape[1]),
  "large": lambda generator, shape: 1e4 + 1e-2 * generator.normal(size=shape),
  "integers": lambda generator, shape: generator.integers(0, 3, shape),
  "equal": lambda generator, shape: np.full(shape, 0.3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (12, 4), (13, 5), (3, 8)], ids=str)
def test_the_auction_reaches_the_best_total_within_its_epsilon(kind, shape):
  S, E = shape
  for seed in range(3):
    score = KINDS[kind](np.random.default_rng(seed), shape).astype(np.float32)
    for real in {S, max(S // 2, 1), 1}:
      mask = np.arange(S) < real
      expert = np.asarray(assign()(score, mask))[:real]
      slots = math.ceil(real / E)
      assert np.max(np.bincount(expert, minlength=E)) <= slots
      kept = np.float64(score[:real])
      epsilon = max(1e-3 * np.max(np.ptp(kept, axis=1)), 1e-6)
      total = kept[np.arange(real), expert].sum()
      # Float32 rounds a bid by less than a thousandth of epsilon, and float64 the sums.
      assert total >= best_total(kept, slots) - 1.001 * real * epsilon - 1e-9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_auction_ends_whatever_the_scores_are(bad):
  score = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
  score[1, 2] = score[4, 0] = bad
  expert = np.asarray(assign()(score, np.ones(6, bool)))
  np.testing.assert_array_equal(np.bincount(expert, minlength=3), 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_base_drops_nothing_and_weighs_by_the_score(shape):
  logits = draw_logits(3, shape)
  for name, mask in masks(shape[:2]).items():
    plan = routed(logits, config_of("base", shape[2]), mask=mask, train=True)
    # The choice itself is judged above; weights, slots and losses follow from it.
    chosen = np.asarray(plan.expert).reshape(shape[:2])
    groups = expected_groups(logits, mask, chosen, plan.capacity)
    assert_plan(plan, groups, logits, mask)
    assert float(plan.metrics["dropped_fraction"]) == 0.0, name
    for group, mask_S in zip(tensors(plan)[0], mask, strict=True):
      counts = np.sum(group, axis=(0, 2))
      assert counts.sum() == mask_S.sum() and counts.max() <= math.ceil(mask_S.sum() / shape[2])


@pytest.mark.parametrize("selection", ["sinkhorn", "base"])
def test_infinite_padding_reaches_no_value_and_no_gradient(selection):
  logits = sinkhorn_logits(0, (2, 8, 4))

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  @jax.value_and_grad
  def total(logits, mask):
    plan = route(logits, config_of(selection, 4), token_mask=mask, train=True)
    return jnp.sum(plan.combine_weights() ** 2) + sum(plan.losses.values())

  for mask in masks((2, 8)).values():
    clean, dirty = total(logits, mask), total(np.where(mask[..., None], logits, np.inf), mask)
    for actual, expected in zip(dirty, clean, strict=True):
      assert np.isfinite(actual).all()
      np.testing.assert_array_equal(actual, expected)
    assert not np.any(np.asarray(dirty[1])[~mask])
