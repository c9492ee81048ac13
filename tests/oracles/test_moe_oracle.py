"""The hand-derived gradients of the layer oracle agree with finite differences."""

import numpy as np
import pytest
from oracles import finite_differences, moe, routing
from oracles.options import CHOICES

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


def assert_gradients_match(kind, activation, *, num_logits=NUM_EXPERTS, **options):
  """Compare all gradients of a layer with finite differences."""
  x, router, experts, dy = make_layer(0, kind)
  if num_logits != NUM_EXPERTS:
    router = np.random.default_rng(1).normal(size=(WIDTH, num_logits))
  dx, d_router, d_experts, d_shared = moe.layer_backward(
    x, router, experts, activation, dy, **options
  )

  def check(actual, at, **fixed):
    def loss(value):
      given = {"x": x, "router": router, "experts": experts, "shared": options.get("shared")}
      for name, make in fixed.items():
        given[name] = make(value)
      changed = options | ({"shared": given["shared"]} if given["shared"] is not None else {})
      y = moe.layer(given["x"], given["router"], given["experts"], activation, **changed)
      return float(np.sum(dy * y))

    np.testing.assert_allclose(actual, finite_differences.gradient(loss, at), atol=TOLERANCE)

  check(dx, x, x=lambda value: value)
  check(d_router, router, router=lambda value: value)
  for index, expert in enumerate(experts):
    for name, weight in expert.items():
      check(d_experts[index][name], weight, experts=replacing(experts, index, name))
  if d_shared is not None:
    shared = options["shared"]
    check(d_shared["gate"], shared["gate"], shared=lambda value: shared | {"gate": value})
    for name, weight in shared["network"].items():
      make = replacing([shared["network"]], 0, name)
      check(
        d_shared["network"][name], weight, shared=lambda v, m=make: shared | {"network": m(v)[0]}
      )


def replacing(experts, index, name):
  """Return a function that puts another matrix into a copy of the experts."""

  def make(value):
    changed = [dict(expert) for expert in experts]
    changed[index][name] = value
    return changed

  return make


@pytest.mark.parametrize(
  ("kind", "activation"),
  [("plain", "relu"), ("plain", "gelu"), ("gated", "silu"), ("gated", "gelu")],
)
def test_expert_gradients_match_finite_differences(kind, activation):
  assert_gradients_match(kind, activation, top_k=2, capacity=NUM_TOKENS)


MASK = [True, True, True, False, True]
DIFFERENTIABLE = ("raw", "renormalized", "renormalized_after_drop", "softmax_selected")


@pytest.mark.parametrize("score", CHOICES["score"])
@pytest.mark.parametrize("weighting", DIFFERENTIABLE)
def test_router_gradients_match_finite_differences(weighting, score):
  assert_gradients_match(
    "plain",
    "silu",
    top_k=3,
    capacity=2,
    weighting=weighting,
    score=score,
    weight_scale=2.5,
    token_mask=MASK,
  )


@pytest.mark.parametrize("weighting", DIFFERENTIABLE)
@pytest.mark.parametrize(
  "options",
  [
    dict(capacity=1),
    dict(capacity=NUM_TOKENS, weight_on="input"),
    dict(capacity=2, reroute_attempts=2),
    dict(capacity=2, num_null_experts=2, num_logits=6, null_expert="identity"),
    dict(capacity=2, norm_order=2.0, score="sigmoid"),
    dict(capacity=2, norm_order=0.5, score="relu", selection="positive"),
    dict(capacity=2, granularity="segment", segment_ids=[1, 1, 2, 2, 2]),
    dict(
      capacity=3,
      selection="hierarchical",
      num_expert_groups=2,
      top_expert_groups=2,
      num_logits=6,
    ),
    dict(capacity=2, bias=[0.3, -0.2, 0.0, 0.1], num_expert_groups=2, group_score="top2_sum"),
    dict(capacity=2, noise=np.random.default_rng(4).normal(size=(NUM_TOKENS, NUM_EXPERTS))),
  ],
  ids=lambda options: "-".join(options),
)
def test_router_gradients_match_in_every_kind_of_routing(options, weighting):
  assert_gradients_match("plain", "gelu", top_k=2, weighting=weighting, token_mask=MASK, **options)


@pytest.mark.parametrize(("combine", "outputs"), [("add", 0), ("gated", 1), ("coefficient", 2)])
def test_shared_expert_gradients_match_finite_differences(combine, outputs):
  generator = np.random.default_rng(5)
  network = make_experts(generator, "gated")[0]
  gate = generator.normal(size=(WIDTH, outputs))
  assert_gradients_match(
    "plain",
    "silu",
    top_k=2,
    capacity=2,
    token_mask=MASK,
    num_null_experts=1,
    num_logits=5,
    null_expert="identity",
    shared={"network": network, "combine": combine, "gate": gate},
  )


def test_straight_through_has_the_gradient_of_the_score_and_hard_has_none():
  x, router, experts, dy = make_layer(1, "plain")
  gradients = {
    weighting: moe.layer_backward(
      x, router, experts, "silu", dy, top_k=2, capacity=2, weighting=weighting
    )[1]
    for weighting in ("raw", "straight_through", "hard")
  }
  # The gradient of a weight is that of the output by it, which the weight's own value is not in.
  np.testing.assert_array_equal(gradients["straight_through"], gradients["raw"])
  assert gradients["raw"].any() and not gradients["hard"].any()


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
    selection="random_second",
    select_draws=[0.99, 0.0, 0.5, 0.99, 0.3],
  )


def test_renormalized_top_1_gives_the_router_no_gradient():
  x, router, experts, dy = make_layer(1, "plain")
  _, d_router, _, _ = moe.layer_backward(
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
