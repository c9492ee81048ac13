"""Rows of experts hold the tokens of the plan in its order, and zeros elsewhere."""

import jax
import numpy as np
import pytest
from comparison import draw_logits
from moe.compiled import products, routed

from moe_jax.errors import UserError
from moe_jax.moe import Dispatch, RoutingConfig, get_dispatcher
from moe_jax.moe.dispatch import _stable_order

G, S, D, E, K, C = 2, 6, 3, 4, 2, 2
MASK = np.arange(S) < np.array([[6], [4]])


def plan_and_tokens():
  config = RoutingConfig(num_experts=E, top_k=K, capacity=C)
  x = jax.random.normal(jax.random.key(0), (G, S, D))
  return routed(draw_logits(0, (G, S, E)), config, mask=MASK), x


def assignments(plan):
  """Yields (group, token, expert, slot) of every assignment that has a slot."""
  for group, token, expert, slot in np.argwhere(np.asarray(plan.dispatch_mask())):
    yield int(group), int(token), int(expert), int(slot)


@pytest.mark.parametrize("form", [Dispatch.EINSUM, Dispatch.GATHER])
def test_a_slot_holds_its_token_or_zeros(form):
  plan, x = plan_and_tokens()
  expected = np.zeros((E, G, C, D), np.float32)
  for group, token, expert, slot in assignments(plan):
    expected[expert, group, slot] = x[group, token]
  assert not np.all(np.any(expected, axis=-1)), "no slot is empty"
  rows = get_dispatcher(form).dispatch(x, plan).rows
  np.testing.assert_array_equal(rows.reshape(E, G, C, D), expected)


def test_ragged_rows_are_sorted_by_expert_with_zeros_behind():
  plan, x = plan_and_tokens()
  ragged = get_dispatcher(Dispatch.RAGGED).dispatch(x, plan)
  per_expert = [[], [], [], []]
  for group, token, expert, _ in assignments(plan):
    per_expert[expert].append(np.asarray(x[group, token]))
  assert ragged.rows_per_expert.tolist() == [len(tokens) for tokens in per_expert]
  served = sum(per_expert, start=[])
  np.testing.assert_array_equal(ragged.rows[: len(served)], served)
  assert ragged.rows.shape == (G * S * K, D)
  assert not np.any(ragged.rows[len(served) :])


def test_an_assignment_without_a_slot_has_no_ragged_row():
  plan, x = plan_and_tokens()
  moves = get_dispatcher(Dispatch.RAGGED).dispatch(x, plan).moves
  without = ~np.asarray(plan.valid).reshape(-1)
  # A row beyond the experts may hold anything by then.
  assert without.any()
  np.testing.assert_array_equal(np.asarray(moves.row)[without], moves.assignment.size)


@pytest.mark.parametrize("form", list(Dispatch))
def test_an_expert_of_weight_zero_still_sees_its_token(form):
  # The ReLU score of the second choice is 0; what decides is the choice.
  logits = np.broadcast_to(np.float32([2.0, -1.0, -2.0, -3.0]), (1, S, E))
  plan = routed(logits, RoutingConfig(num_experts=E, top_k=K, score="relu", overflow="dropless"))
  assert not np.any(np.asarray(plan.weight)[:, 1::2])
  sent = get_dispatcher(form).dispatch(jax.numpy.ones((1, S, D)), plan)
  assert np.all(sent.rows, axis=-1).sum() == S * K
  if form == Dispatch.RAGGED:
    assert sent.rows_per_expert.tolist() == [S, S, 0, 0]


def test_one_hot_products_have_full_precision_on_every_platform():
  plan, x = plan_and_tokens()
  einsum = get_dispatcher(Dispatch.EINSUM)
  there = products(lambda x: einsum.dispatch(x, plan).rows, x)
  back = products(lambda x: einsum.combine(einsum.dispatch(x, plan), plan), x)
  assert there == ["HIGHEST"] and back == ["HIGHEST"] * 2


def test_an_unknown_form_is_refused():
  with pytest.raises(UserError, match=r"dispatch = 'scatter'.*einsum, gather, ragged"):
    get_dispatcher("scatter")


@pytest.mark.parametrize("bound", [5, 2**30], ids=["keys", "argsort"])
def test_order_is_stable(bound):
  values = np.random.default_rng(0).integers(5, size=50).astype(np.int32)
  expected = np.argsort(values, stable=True)
  np.testing.assert_array_equal(_stable_order(jax.numpy.array(values), bound), expected)
