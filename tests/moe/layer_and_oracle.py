"""MoELayer and all its gradients beside those of the oracle, for any config and dispatch."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
from comparison import ROUTING_MARGIN, relative_error
from flax import nnx
from moe.compiled import FAST_COMPILE
from moe.oracle_view import options_of, split_groups
from oracles import decisions
from oracles import moe as oracle

from moe_jax.moe import MoELayer

# Float32 sums of tens of products, through a softmax and two matrices.
TOLERANCE = 1e-5
B, L, D = 2, 5, 6
# A logit whose scores are 0 in both precisions.
NEVER = -1e9
NAMES = {False: {"up": "wi", "down": "wo"}, True: {"gate": "wi_gate", "up": "wi_up", "down": "wo"}}
MASKS = {
  "none": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
  "padding": [[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]],
  "sequence": [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
  "all": [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
}


@functools.cache
def split_layer(config, shut=None):
  """Returns the graph, a state, and x with routing margins under every mask, of one config.

  With margins, too, where the expert `shut` is one that nobody wants.
  """
  graph, state = nnx.split(MoELayer(D, config, key=jax.random.key(0)))
  states = [state] if shut is None else [state, without_expert(state, shut, NEVER)]
  params = [nnx.to_pure_dict(one) for one in states]
  for seed in range(100):
    x = np.random.default_rng(seed).normal(size=(B, L, D)).astype(np.float32)
    # A constant channel lets one weight of the kernel shut an expert.
    x[..., 0] = 1.0
    with decisions.watched() as gaps:
      for own, mask in itertools.product(params, MASKS.values()):
        oracle_layer(config, own, x, np.array(mask, bool), np.ones_like(x))
    if min(gaps, default=np.inf) > ROUTING_MARGIN:
      return graph, state, x
  raise AssertionError("no input with margins found")


def without_expert(state, expert, logit=-40.0):
  """Returns the state with a router that adds a logit to one expert, of a probability of e^-40."""
  kernel = state["router"]["kernel"]
  changed = nnx.to_pure_dict(state)
  changed["router"]["kernel"] = kernel[...].at[0, expert].add(logit)
  copy = jax.tree.map(lambda leaf: leaf, state)
  nnx.replace_by_pure_dict(copy, changed)
  return copy


@functools.cache
def compiled_layer(config, form):
  """Returns a function that gives y and the gradients by state and by x."""
  graph, _, _ = split_layer(config)

  def run(state, x, mask, cotangent):
    def forward(state, x):
      layer = nnx.merge(graph, state)
      layer.config = dataclasses.replace(config, dispatch=form)
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
  experts = [{name: w[e] for name, w in stacked.items()} for e in range(config.routing.num_experts)]
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


def run_and_compare(config, form, state, x, mask_name, router_floor=1e-6):
  """Compares everything, the gradients of a random cotangent; returns y and these gradients.

  `router_floor` is the size below which the router's gradient is compared absolutely.
  """
  mask = np.array(MASKS[mask_name], bool)
  cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  y, dstate, dx = compiled_layer(config, form)(state, x, mask, cotangent)
  params, grads = nnx.to_pure_dict(state), nnx.to_pure_dict(dstate)
  expected = oracle_layer(config, params, x, mask, cotangent)
  errors = jax.tree.map(relative_error, (y, dx, grads), expected)
  kernels = grads["router"]["kernel"], expected[2]["router"]["kernel"]
  errors[2]["router"]["kernel"] = relative_error(*kernels, router_floor)
  assert max(jax.tree.leaves(errors)) <= TOLERANCE, errors
  assert not np.any(np.asarray(y)[~mask]) and not np.any(np.asarray(dx)[~mask])
  return y, grads, dx
