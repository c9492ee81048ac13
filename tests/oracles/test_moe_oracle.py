"""The hand-derived gradients of the layer oracle agree with finite differences."""

import numpy as np
import pytest
from oracles import finite_differences, moe, routing

# Central differences of O(1) values in float64 are good to about 1e-9.
TOLERANCE = 1e-7
NUM_TOKENS, WIDTH, HIDDEN, NUM_EXPERTS = 5, 3, 4, 4


def make_experts(generator, kind):
  """Return random experts, plain or gated."""
  names = ["wi_gate", "wi_up"] if kind == "gated" else ["wi"]
  return [
    {name: generator.normal(size=(WIDTH, HIDDEN)) for name in names}
    | {"wo": generator.normal(size=(HIDDEN, WIDTH))}
    for _ in range(NUM_EXPERTS)
  ]


def make_layer(seed, kind):
  """Return x, router, experts and an output gradient."""
  generator = np.random.default_rng(seed)
  x = generator.normal(size=(NUM_TOKENS, WIDTH))
  router = generator.normal(size=(WIDTH, NUM_EXPERTS))
  return x, router, make_experts(generator, kind), generator.normal(size=x.shape)


def assert_gradients_match(kind, activation, **options):
  """Compare the three gradients of a layer with finite differences."""
  x, router, experts, dy = make_layer(0, kind)
  dx, d_router, d_experts = moe.layer_backward(x, router, experts, activation, dy, **options)

  def loss(x, router, experts):
    return float(np.sum(dy * moe.layer(x, router, experts, activation, **options)))

  expected = finite_differences.gradient(lambda value: loss(value, router, experts), x)
  np.testing.assert_allclose(dx, expected, atol=TOLERANCE)
  expected = finite_differences.gradient(lambda value: loss(x, value, experts), router)
  np.testing.assert_allclose(d_router, expected, atol=TOLERANCE)
  for index, expert in enumerate(experts):
    for name, weight in expert.items():

      def loss_of_weight(value, index=index, name=name):
        changed = [dict(expert) for expert in experts]
        changed[index][name] = value
        return loss(x, router, changed)

      expected = finite_differences.gradient(loss_of_weight, weight)
      np.testing.assert_allclose(d_experts[index][name], expected, atol=TOLERANCE)


@pytest.mark.parametrize(
  ("kind", "activation"),
  [("plain", "relu"), ("plain", "gelu"), ("gated", "silu"), ("gated", "gelu")],
)
def test_expert_gradients_match_finite_differences(kind, activation):
  assert_gradients_match(kind, activation, top_k=2, capacity=NUM_TOKENS)


@pytest.mark.parametrize("capacity", [1, 2, NUM_TOKENS])
@pytest.mark.parametrize("weighting", routing.WEIGHTINGS)
def test_router_gradients_match_finite_differences(weighting, capacity):
  token_mask = [True, True, True, False, True]
  assert_gradients_match(
    "gated", "silu", top_k=3, capacity=capacity, weighting=weighting, token_mask=token_mask
  )


@pytest.mark.parametrize("drop_order", ["choice_major", "token_major"])
def test_router_gradients_match_with_one_choice(drop_order):
  assert_gradients_match("plain", "relu", top_k=1, capacity=1, drop_order=drop_order)


def test_router_gradients_match_with_random_second_expert():
  assert_gradients_match(
    "plain",
    "gelu",
    top_k=2,
    capacity=2,
    weighting="renormalized",
    second_expert="random",
    second_expert_draws=[0.99, 0.0, 0.5, 0.99, 0.3],
  )


def test_renormalized_top_1_gives_the_router_no_gradient():
  x, router, experts, dy = make_layer(1, "plain")
  _, d_router, _ = moe.layer_backward(
    x, router, experts, "relu", dy, top_k=1, capacity=NUM_TOKENS, weighting="renormalized"
  )
  np.testing.assert_allclose(d_router, 0.0, atol=1e-12)


def test_expert_without_tokens_gets_zero_gradient():
  x, _, experts, dy = make_layer(2, "gated")
  assignments = [routing.Assignment(token, 0, 1, token, 0.5) for token in range(NUM_TOKENS)]
  _, d_experts, _ = moe.moe_backward(x, experts, assignments, "silu", dy)
  for index in (0, 2, 3):
    for value in d_experts[index].values():
      assert not value.any()


def test_dropless_routing_equals_the_dense_sum():
  x, router, experts, _ = make_layer(3, "gated")
  routed = routing.route_group(x @ router, top_k=NUM_EXPERTS, capacity=NUM_TOKENS)
  expected = moe.dense_moe(x, experts, routed.scores, "silu")
  # Both add the same E products, in another order.
  np.testing.assert_allclose(
    moe.moe(x, experts, routed.assignments, "silu"), expected, rtol=0, atol=1e-13
  )
