"""MoELayer and its gradients equal the oracles' for selections that look at a whole group.

Expert choice, Sinkhorn, BASE, SparseMixer and Soft MoE, in every form of dispatch that carries the
plan.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from comparison import relative_error
from flax import nnx
from moe.compiled import FAST_COMPILE
from moe.mixed_draws import sparsemixer_draws
from oracles import moe, routing, soft_moe, sparsemixer, whole_groups

from moe_jax.layers.dropout import split_key
from moe_jax.moe import Dispatch, MoEConfig, MoELayer, RoutingConfig

# Float32 sums of tens of products, through a softmax and two matrices.
TOLERANCE = 1e-5
# Decisions closer than this are redrawn: float32 products of D terms are rounded at 1e-6.
MARGIN = 1e-4
B, L, D, F, E = 2, 5, 6, 5, 4
KEY = jax.random.key(8)
ITERATIONS = 6
FORMS = list(Dispatch)


def config_of(selection, **fields):
  routing = RoutingConfig(num_experts=E, selection=selection, grouping="sequence", **fields)
  return MoEConfig(routing, F, gated=True, activation="silu", dispatch="einsum")


CASES = {
  "expert_choice": config_of("expert_choice", capacity=2),
  "expert_choice_on_input": config_of(
    "expert_choice", capacity=3, score="sigmoid", weight_on="input"
  ),
  "expert_choice_all": config_of("expert_choice", capacity=L),
  "sinkhorn": config_of("sinkhorn", capacity=2, sinkhorn_iterations=ITERATIONS),
  "base": config_of("base", capacity_factor=1.0, score="sigmoid"),
  "sparsemixer": config_of("sparsemixer", top_k=2, weighting="sparsemixer", capacity=3),
  "sparsemixer_all": config_of(
    "sparsemixer", top_k=E, weighting="sparsemixer", overflow="dropless"
  ),
  "soft": config_of("soft", capacity=2, balance_loss_weight=0.0),
}
MASKS = {
  "none": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
  "padding": [[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]],
  "sequence": [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
  "all": [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
}
NAMES = {"gate": "wi_gate", "up": "wi_up", "down": "wo"}


def route_key():
  """Returns the key that a training call of the layer with KEY gives to `route`."""
  return split_key(KEY, 4)[1]


def select(config, logits_SE, mask_S, group, plan_experts):
  """Returns the assignments of one group, and the logits' gradient given that of the weights."""
  score, num_tokens = str(config.score), len(logits_SE)

  def raw_backward(d_weights):
    return whole_groups.raw_score_backward(logits_SE, d_weights, score)

  if config.selection == "expert_choice":
    options = {"capacity": config.capacity, "score": score, "token_mask": mask_S}
    return whole_groups.expert_choice(logits_SE, **options), raw_backward
  if config.selection == "sparsemixer":
    gumbel, uniform = sparsemixer_draws(route_key(), (B, L, E), config.top_k)
    chosen = sparsemixer.picks(
      logits_SE, top_k=config.top_k, gumbel=gumbel[:, group], draws=uniform[:, group]
    )
    wishes = [
      (token, k, *chosen[token][k][:2])
      for k in range(config.top_k)
      for token in whole_groups.real_tokens(mask_S, num_tokens)
    ]
    capacity = num_tokens if config.overflow == "dropless" else config.capacity
    backward = functools.partial(sparsemixer.logits_backward, logits_SE, chosen)
    return whole_groups.place(wishes, E, capacity), backward
  experts = plan_experts
  if config.selection == "sinkhorn":
    matrix = whole_groups.sinkhorn_matrix(logits_SE, iterations=ITERATIONS, token_mask=mask_S)
    experts = [routing.top_experts(row, 1)[0] for row in matrix]
  scores = whole_groups.scores_of(logits_SE, score)
  capacity = config.capacity or math.ceil(num_tokens / E)
  return (
    whole_groups.one_expert_each(experts, scores, capacity=capacity, token_mask=mask_S),
    raw_backward,
  )


def oracle_group(config, x_SD, kernel, experts, mask_S, dy_SD, group, plan_experts):
  """Returns y, dx, d kernel and the gradients of the experts of one group."""
  if config.selection == "soft":
    options = {"capacity": config.capacity, "token_mask": mask_S}
    y_SD = soft_moe.layer(x_SD, kernel, experts, "silu", **options)
    return y_SD, *soft_moe.layer_backward(x_SD, kernel, experts, "silu", dy_SD, **options)
  logits_SE = x_SD @ kernel
  assignments, backward = select(config, logits_SE, mask_S, group, plan_experts)
  call = x_SD, experts, assignments, "silu"
  weight_on = str(config.weight_on)
  y_SD = moe.moe(*call, weight_on=weight_on)
  dx_SD, d_experts, d_weights = moe.moe_backward(*call, dy_SD, weight_on=weight_on)
  d_logits = backward(d_weights)
  return y_SD, dx_SD + d_logits @ kernel.T, x_SD.T @ d_logits, d_experts


def margin(config, x, kernel):
  """Returns the smallest gap that decides a choice, over the masks of MASKS."""
  gaps = [math.inf]
  for group, x_SD in enumerate(np.float64(x)):
    logits = x_SD @ kernel
    if config.selection == "expert_choice":
      scores = whole_groups.scores_of(logits, str(config.score))
      gaps.append(np.min(np.diff(np.sort(scores, axis=0), axis=0)))
    if config.selection == "sparsemixer":
      gumbel, uniform = sparsemixer_draws(route_key(), (B, L, E), config.top_k)
      random = {"gumbel": gumbel[:, group], "draws": uniform[:, group]}
      gaps.append(sparsemixer.sampling_margin(logits, top_k=config.top_k, **random))
    if config.selection == "sinkhorn":
      for mask in MASKS.values():
        matrix = whole_groups.sinkhorn_matrix(logits, iterations=ITERATIONS, token_mask=mask[group])
        best = np.sort(matrix, axis=1)
        gaps.append(np.min(1.0 - best[:, -2] / best[:, -1]))
  return min(gaps)


@functools.cache
def split_layer(name):
  """Returns the graph, a state, and x without a close decision."""
  graph, state = nnx.split(MoELayer(D, CASES[name], key=jax.random.key(0)))
  kernel = np.asarray(state["router"]["kernel"][...], np.float64)
  for seed in range(300):
    x = np.random.default_rng(seed).normal(size=(B, L, D)).astype(np.float32)
    if margin(CASES[name].routing, x, kernel) > MARGIN:
      return graph, state, x
  raise AssertionError("no input with margins found")


@functools.cache
def compiled_layer(name, form):
  """Returns a function that gives y, the experts chosen, and the gradients by state and by x."""
  graph, _, _ = split_layer(name)

  def run(state, x, mask, cotangent):
    def forward(state, x):
      layer = nnx.merge(graph, state)
      layer.config = dataclasses.replace(CASES[name], dispatch=form)
      y, aux = layer(x, token_mask=mask, key=KEY, train=True)
      return y, getattr(aux.plan, "expert", None)

    y, vjp, expert = jax.vjp(forward, state, x, has_aux=True)
    return y, expert, *vjp(cotangent)

  return jax.jit(run, compiler_options=FAST_COMPILE)


def fits(name, form):
  """Tells whether the form carries the plan: slots that mix all tokens are a product."""
  return name != "soft" or form == Dispatch.EINSUM


@pytest.mark.parametrize(
  "name, form", [(name, form) for name in CASES for form in FORMS if fits(name, form)], ids=str
)
def test_layer_and_gradients_equal_the_oracle(name, form):
  _, state, x = split_layer(name)
  params = nnx.to_pure_dict(state)
  kernel, weights = params["router"]["kernel"], params["experts"]["weights"]
  experts = [{NAMES[n]: np.float64(w[e]) for n, w in weights.items()} for e in range(E)]
  cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  for mask_name, mask in MASKS.items():
    mask = np.array(mask, bool)
    y, chosen, dstate, dx = compiled_layer(name, form)(state, x, mask, cotangent)
    grads = nnx.to_pure_dict(dstate)
    groups = [
      oracle_group(
        CASES[name].routing,
        np.float64(x[g]),
        np.float64(kernel),
        experts,
        mask[g],
        np.float64(cotangent[g]),
        g,
        None if chosen is None else chosen[g],
      )
      for g in range(B)
    ]
    ys, dxs, dkernels, dexperts = zip(*groups, strict=True)
    wanted = {
      n: np.stack([sum(d[e][o] for d in dexperts) for e in range(E)]) for n, o in NAMES.items()
    }
    actual = (y, dx, grads["router"]["kernel"], dict(grads["experts"]["weights"]))
    expected = (np.stack(ys), np.stack(dxs), sum(dkernels), wanted)
    errors = jax.tree.map(relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) <= TOLERANCE, (mask_name, errors)
    assert not np.any(np.asarray(y)[~mask]) and not np.any(np.asarray(dx)[~mask])
