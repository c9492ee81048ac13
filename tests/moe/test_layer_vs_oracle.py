"""MoELayer and all its gradients equal the oracle's, in every form of dispatch."""

import functools

import jax
import numpy as np
import pytest
from comparison import ROUTING_MARGIN, relative_error
from flax import nnx
from moe.compiled import FAST_COMPILE
from moe.oracle_view import options_of, split_groups
from oracles import decisions
from oracles import moe as oracle

from moe_jax.moe import Dispatch, MoEConfig, MoELayer, RoutingConfig

# Float32 sums of tens of products, through a softmax and two matrices.
TOLERANCE = 1e-5
B, L, D, F, E = 2, 5, 6, 5, 4
NAMES = {False: {"up": "wi", "down": "wo"}, True: {"gate": "wi_gate", "up": "wi_up", "down": "wo"}}


def config_of(activation, *, gated, top_k, shared=None, **routing):
  fields = RoutingConfig(num_experts=E, top_k=top_k, **routing)
  more = {"shared_hidden_dim": 3, "shared_combine": shared} if shared else {}
  return MoEConfig(fields, F, gated=gated, activation=activation, **more)


CASES = {
  "one_choice": config_of("relu", gated=False, top_k=1, capacity=2, grouping="sequence"),
  "two_choices": config_of(
    "silu", gated=True, top_k=2, capacity=2, weighting="renormalized", grouping="sequence"
  ),
  # 10 tokens in groups of 4, the last with two fillers.
  "after_drop": config_of(
    "gelu",
    gated=True,
    top_k=3,
    capacity=2,
    weighting="renormalized_after_drop",
    drop_order="token_major",
    grouping="fixed",
    group_size=4,
  ),
  "dropless_all_experts": config_of(
    "gelu", gated=False, top_k=E, weighting="softmax_selected", overflow="dropless"
  ),
  "max_score": config_of("silu", gated=False, top_k=2, capacity=2, priority="max_score"),
  "all_experts_one_slot": config_of("relu", gated=True, top_k=E, capacity=1),
  "weight_on_input": config_of(
    "silu", gated=True, top_k=2, capacity=2, score="sigmoid", weight_on="input", weight_scale=1.5
  ),
  "identity_experts": config_of(
    "gelu",
    gated=False,
    top_k=3,
    capacity=2,
    num_null_experts=2,
    null_expert="identity",
    weighting="renormalized",
    shared="add",
    grouping="sequence",
  ),
  "rerouted": config_of(
    "relu",
    gated=False,
    top_k=2,
    capacity=3,
    overflow="reroute",
    reroute_attempts=2,
    weighting="renormalized_after_drop",
    weight_norm_order=2.0,
    shared="gated",
    grouping="sequence",
  ),
  "rerouted_input": config_of(
    "silu",
    gated=True,
    top_k=1,
    capacity=3,
    overflow="reroute",
    weight_on="input",
    score="sqrt_softplus",
    shared="coefficient",
  ),
}
MASKS = {
  "none": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
  "padding": [[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]],
  "sequence": [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
}


@functools.cache
def split_layer(name):
  """Returns the graph, a state, and x with routing margins under every mask, of one case."""
  graph, state = nnx.split(MoELayer(D, CASES[name], key=jax.random.key(0)))
  params = nnx.to_pure_dict(state)
  for seed in range(100):
    x = np.random.default_rng(seed).normal(size=(B, L, D)).astype(np.float32)
    # A constant channel lets one weight of the kernel shut an expert.
    x[..., 0] = 1.0
    with decisions.watched() as gaps:
      for mask in MASKS.values():
        oracle_layer(CASES[name], params, x, np.array(mask, bool), np.ones_like(x))
    if min(gaps, default=np.inf) > ROUTING_MARGIN:
      return graph, state, x
  raise AssertionError("no input with margins found")


def without_expert(state, expert):
  """Returns the state with a router that gives one expert a probability of e^-40."""
  kernel = state["router"]["kernel"]
  changed = nnx.to_pure_dict(state)
  changed["router"]["kernel"] = kernel[...].at[0, expert].add(-40.0)
  copy = jax.tree.map(lambda leaf: leaf, state)
  nnx.replace_by_pure_dict(copy, changed)
  return copy


@functools.cache
def compiled_layer(name, form):
  """Returns a function that gives y and the gradients by state and by x."""
  graph, _, _ = split_layer(name)

  def run(state, x, mask, cotangent):
    def forward(state, x):
      layer = nnx.merge(graph, state)
      layer.config = MoEConfig(**{**vars(CASES[name]), "dispatch": form})
      return layer(x, token_mask=mask, train=True)[0]

    y, vjp = jax.vjp(forward, state, x)
    return y, *vjp(cotangent)

  return jax.jit(run, compiler_options=FAST_COMPILE)


def networks(weights, config):
  """Returns the weights of one network, or of all experts, in float64 by the oracle's names."""
  return {name: np.float64(weights[own]) for own, name in NAMES[config.gated].items()}


def layer_options(config, params, num_tokens):
  """Returns what the oracle's layer takes besides x, the router and the experts."""
  options = options_of(config.routing, num_tokens, train=True)
  options |= {
    "weight_on": str(config.routing.weight_on),
    "null_expert": str(config.routing.null_expert),
  }
  if config.shared_hidden_dim:
    shared = params["shared"]
    options["shared"] = {
      "network": networks(shared["network"]["weights"], config),
      "combine": str(config.shared_combine),
      "gate": np.float64(shared.get("gate", np.zeros((D, 0)))),
    }
  return options


def oracle_layer(config, params, x, mask, cotangent):
  """Returns y, dx and the gradient of every parameter by its name, summed over groups."""
  stacked = networks(params["experts"]["weights"], config)
  experts = [{name: w[e] for name, w in stacked.items()} for e in range(E)]
  kernel = np.float64(params["router"]["kernel"])
  y, dx, grads = [], [], []
  groups = (split_groups(a, config.routing) for a in (np.float64(x), mask, np.float64(cotangent)))
  for x_SD, mask_S, dy_SD in zip(*groups, strict=True):
    options = layer_options(config, params, len(x_SD)) | {"token_mask": mask_S}
    arguments = (x_SD, kernel, experts, config.activation)
    y.append(oracle.layer(*arguments, **options))
    own_dx, *own = oracle.layer_backward(*arguments, dy_SD, **options)
    dx.append(own_dx)
    grads.append(named_gradients(config, *own))
  total = jax.tree.map(lambda *parts: sum(parts), *grads)
  y, dx = (np.concatenate(parts)[: B * L] for parts in (y, dx))
  return y.reshape(B, L, D), dx.reshape(B, L, D), total


def named_gradients(config, d_kernel, d_experts, d_shared):
  """Returns one group's gradients in the tree of the layer's parameters."""
  names = NAMES[config.gated].items()
  stacked = {own: np.stack([d[name] for d in d_experts]) for own, name in names}
  tree = {"router": {"kernel": d_kernel}, "experts": {"weights": stacked}}
  if d_shared is not None:
    network = {own: d_shared["network"][name] for own, name in names}
    tree["shared"] = {"network": {"weights": network}}
    if d_shared["gate"].size:
      tree["shared"]["gate"] = d_shared["gate"]
  return tree


def run_and_compare(name, form, state, mask_name):
  """Compares everything; returns y and the gradients by state and by x."""
  _, _, x = split_layer(name)
  mask = np.array(MASKS[mask_name], bool)
  cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  y, dstate, dx = compiled_layer(name, form)(state, x, mask, cotangent)
  params, grads = nnx.to_pure_dict(state), nnx.to_pure_dict(dstate)
  expected = oracle_layer(CASES[name], params, x, mask, cotangent)
  errors = jax.tree.map(relative_error, (y, dx, grads), expected)
  assert max(jax.tree.leaves(errors)) <= TOLERANCE, errors
  assert not np.any(np.asarray(y)[~mask]) and not np.any(np.asarray(dx)[~mask])
  return y, grads, dx


@pytest.mark.parametrize("form", list(Dispatch))
@pytest.mark.parametrize("name", CASES)
def test_layer_and_gradients_equal_the_oracle(name, form):
  _, state, _ = split_layer(name)
  for mask_name in MASKS:
    run_and_compare(name, form, state, mask_name)


@pytest.mark.parametrize("form", list(Dispatch))
@pytest.mark.parametrize("name", ["one_choice", "two_choices", "max_score"])
def test_an_expert_that_nobody_asks_for_gets_exactly_no_gradient(name, form):
  _, state, _ = split_layer(name)
  _, grads, _ = run_and_compare(name, form, without_expert(state, 2), "padding")
  for value in grads["experts"]["weights"].values():
    assert not np.any(value[2])
    assert np.any(np.delete(value, 2, axis=0))


@pytest.mark.parametrize("form", list(Dispatch))
@pytest.mark.parametrize("name", ["one_choice", "after_drop"])
def test_a_call_of_padding_alone_gives_exact_zeros(name, form):
  _, state, x = split_layer(name)
  mask = np.zeros((B, L), bool)
  result = compiled_layer(name, form)(state, x, mask, np.ones_like(x))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("name", ["one_choice", "after_drop", "all_experts_one_slot"])
def test_every_form_drops_the_same_tokens(name):
  _, state, x = split_layer(name)
  mask = np.ones((B, L), bool)
  zeros = []
  for form in Dispatch:
    y, _, _ = compiled_layer(name, form)(state, x, mask, np.ones_like(x))
    zeros.append(np.all(np.asarray(y) == 0.0, axis=-1))
  assert zeros[0].any()
  np.testing.assert_array_equal(zeros[0], zeros[1])
  np.testing.assert_array_equal(zeros[0], zeros[2])
