"""SparseMixer-v2 equals the token loop of the released code, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from moe.compiled import FAST_COMPILE, routed
from moe.mixed_draws import sparsemixer_draws
from oracles import sparsemixer

from moe_jax.moe import RoutingConfig, route

TOLERANCE = 1e-5
KEY = jax.random.key(5)
# Gaps of logits around 5, whose float32 rounding is 5e-7.
MARGIN = 1e-5


def config_of(num_experts, top_k, **fields):
  return RoutingConfig(
    num_experts=num_experts,
    top_k=top_k,
    selection="sparsemixer",
    weighting="sparsemixer",
    **{"overflow": "dropless", **fields},
  )


def masks(shape):
  real = np.ones(shape, bool)
  right, group = real.copy(), real.copy()
  right[-1, shape[1] // 2 :], group[-1] = False, False
  return {"none": real, "right": right, "group": group, "all": ~real}


def draw_logits(shape, top_k, level, spread):
  """Returns logits level + spread * normal without a close decision, in training or outside."""
  gumbel, uniform = sparsemixer_draws(KEY, shape, top_k)
  for seed in range(200):
    noise = np.random.default_rng(seed).normal(size=shape)
    logits = (level + spread * noise).astype(np.float32)
    margins = [
      sparsemixer.sampling_margin(
        np.float64(logits[g]), top_k=top_k, gumbel=gumbel[:, g], draws=uniform[:, g]
      )
      for g in range(shape[0])
    ]
    if min(margins) > MARGIN:
      return logits
  raise AssertionError("no logits with margins found")


def expected(logits, mask, top_k, train, d_weights):
  """Returns the weights (G, S, E) and the logits' gradient under `d_weights` (G, S, E)."""
  gumbel, uniform = sparsemixer_draws(KEY, logits.shape, top_k)
  weights, d_logits = np.zeros(logits.shape), np.zeros(logits.shape)
  for g, rows in enumerate(np.float64(logits)):
    random = {"gumbel": gumbel[:, g], "draws": uniform[:, g]} if train else {}
    chosen = sparsemixer.picks(rows, top_k=top_k, **random)
    # A pad is never asked, so that its logits have no gradient.
    chosen = [picked if real else [] for picked, real in zip(chosen, mask[g], strict=True)]
    for token, picked in enumerate(chosen):
      for expert, weight, _ in picked:
        weights[g, token, expert] = weight
    d_logits[g] = sparsemixer.logits_backward(rows, chosen, d_weights[g])
  return weights, d_logits


@functools.cache
def compiled(config, train):
  def run(logits, mask, d_weights):
    def weights(logits):
      plan = route(logits, config, token_mask=mask, key=KEY, train=train)
      return jnp.sum(plan.combine_weights(), axis=-1)

    value, vjp = jax.vjp(weights, logits)
    return value, *vjp(d_weights)

  return jax.jit(run, compiler_options=FAST_COMPILE)


# G, S, E, K: one token, one expert, the released K = 2, and all experts.
SHAPES = [(2, 1, 4, 2), (1, 3, 1, 1), (2, 7, 4, 1), (2, 12, 6, 2), (2, 5, 3, 3)]
# Logits close together, spread out, and around zero and below it, where the scale is |logit|.
LEVELS = {"close": (5.0, 0.05), "spread": (0.0, 1.0), "negative": (-5.0, 0.05)}


@pytest.mark.parametrize(
  "shape, train", [(shape, True) for shape in SHAPES] + [(SHAPES[3], False)], ids=str
)
def test_weights_and_gradients_equal_the_released_code(shape, train):
  *shape, K = shape
  run = compiled(config_of(shape[-1], K), train)
  d_weights = np.random.default_rng(9).normal(size=shape).astype(np.float32)
  for level, spread in LEVELS.values():
    logits = draw_logits(tuple(shape), K, level, spread)
    for mask in masks(shape[:2]).values():
      weights, d_logits = run(logits, mask, d_weights)
      wanted, d_wanted = expected(logits, mask, K, train, d_weights)
      np.testing.assert_array_equal(np.asarray(weights) > 0, wanted > 0)
      assert relative_error(weights, wanted) <= TOLERANCE
      assert relative_error(d_logits, d_wanted) <= TOLERANCE


def test_training_draws_every_branch_of_the_released_code():
  logits = draw_logits((2, 12, 6), 2, 5.0, 0.05)
  gumbel, uniform = sparsemixer_draws(KEY, logits.shape, 2)
  kinds = set()
  for g, rows in enumerate(np.float64(logits)):
    tokens = sparsemixer.picks(rows, top_k=2, gumbel=gumbel[:, g], draws=uniform[:, g])
    for token, picked in enumerate(tokens):
      for k, (expert, _, probs) in enumerate(picked):
        kinds.add((expert == max(probs, key=probs.get), uniform[k, g, token] > 0.75))
  assert kinds == {(True, True), (True, False), (False, True), (False, False)}


def test_a_tie_goes_to_the_lower_expert_and_shares_the_probability():
  # Logits of 0 divide 0 by 0 in the released code, which then masks nothing.
  for value in (0.3, 0.0):
    plan = routed(np.full((1, 2, 4), value, np.float32), config_of(4, 2))
    np.testing.assert_array_equal(plan.expert, [[0, 1, 0, 1]])
    # Four in reach, then the three that are left.
    np.testing.assert_allclose(plan.weight, [[1 / 4, 1 / 3] * 2], rtol=TOLERANCE)


def test_a_dropped_pick_has_no_weight_and_no_gradient():
  logits = draw_logits((1, 6, 4), 2, 5.0, 0.05)
  mask, ones = np.ones((1, 6), bool), np.ones_like(logits)
  weights, gradient = compiled(config_of(4, 2, overflow="drop", capacity=1), True)(
    logits, mask, ones
  )
  kept = np.any(np.asarray(weights)[0] > 0, axis=1)
  assert 0 < kept.sum() < 6
  assert not np.any(np.asarray(gradient)[0, ~kept]) and np.any(gradient)
