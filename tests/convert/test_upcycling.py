"""Upcycling: copies and parts equal the dense network, and what is drawn anew is as told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import relative_error
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from surgery_cases import (
  dense_config,
  dense_output,
  experts_output,
  float64,
  logits_of,
  model_of,
  random_leaves,
)
from tiny_models import random_tokens, tiny_config

from moe_jax.convert.rules import parameter_shapes
from moe_jax.convert.surgery import (
  Role,
  UpcycleOptions,
  approximations,
  choose_layers,
  upcycled_config,
  upcycling,
  with_output_scale,
)
from moe_jax.convert.surgery.combine_scale import weight_total
from moe_jax.errors import UserError
from moe_jax.models.depth_config import DepthConfig
from moe_jax.moe import RoutingConfig, preset
from moe_jax.moe.scores import score_logits
from moe_jax.moe.weights import weigh

KEY = jax.random.key(5)
NETWORKS = {
  "gated": dict(),
  "plain": dict(gated=False, activation="relu"),
  "plain, biases": dict(gated=False, activation="gelu_exact", bias=True),
  "gated, biases, clamped": dict(bias=True, clamp=0.7),
}
GROUPS = dict(router="virtual_groups")
EXACT = {
  "copies": (dict(), dict(num_experts=4, top_k=2)),
  "2 parts": (dict(parts=2, **GROUPS), dict(num_experts=6, top_k=2)),
  "2 parts, 2 copies a token": (dict(parts=2, **GROUPS), dict(num_experts=6, top_k=4)),
  "4 parts, weights scaled": (
    dict(parts=4, scaling="weights", **GROUPS),
    dict(num_experts=8, top_k=4),
  ),
  "1 of 3 parts shared": (dict(parts=3, shared_parts=1, **GROUPS), dict(num_experts=4, top_k=2)),
  "2 of 3 parts shared": (dict(parts=3, shared_parts=2), dict(num_experts=3, top_k=2)),
}


def upcycled(options, routing, config=None, layers="every_other"):
  """Returns source, target and operation."""
  source = config or dense_config()
  options = UpcycleOptions(**options)
  target = upcycled_config(source, routing, choose_layers(source, layers), options)
  target = with_output_scale(target, options)
  return source, target, upcycling(source, target, options, KEY)


def one_layer(operation, leaves, role=Role.VALUE):
  """Returns the dense and the upcycled feed-forward of layer 1."""
  prefix = ("segments", 0, "blocks", 1, "feed_forward")
  dense = {p[5:]: a[0] for p, a in leaves.items() if p[:5] == prefix}
  return dense, operation.edits[1](dense, role)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("options, routing", EXACT.values(), ids=EXACT)
def test_an_upcycled_layer_is_the_dense_one(network, options, routing):
  config = dense_config(mlp=network)
  routing = preset("mixtral", **routing)
  source, target, operation = upcycled(options, routing, config)
  dense, experts = one_layer(operation, random_leaves(source))
  x = np.random.default_rng(0).normal(size=(7, config.model_dim))
  expected = dense_output(x, float64(dense), config.mlp)
  # Float64 sums of the same products; scales and shares of a bias were rounded to float32.
  assert relative_error(experts_output(x, experts, target.moe), expected) < 3e-7
  assert approximations(target, UpcycleOptions(**options)) == []


@pytest.mark.parametrize("layers", ["0,2,3"])
def test_an_upcycled_model_has_the_dense_models_logits(layers):
  options = dict(parts=2, shared_parts=1, **GROUPS)
  routing = preset("mixtral", num_experts=4)
  source, target, operation = upcycled(options, routing, layers=layers)
  assert target.moe_layers() == list(choose_layers(source, layers))
  leaves, tokens = random_leaves(source), random_tokens(source, 2, 6)
  made = logits_of(target, operation.apply(leaves), tokens)
  # Float32 in another order: measured 3e-7.
  assert relative_error(made, logits_of(source, leaves, tokens)) < 1e-5


def test_depth_blocks_and_multi_token_prediction_are_upcycled_too():
  depth = DepthConfig(capacity=0.5)
  segments = (("attention:dense attention:dense:depth", 1), ("attention:dense", 1))
  source = dense_config(segments, depth=depth, mtp_depth=1)
  source, target, operation = upcycled({}, preset("mixtral", num_experts=3), source, layers="1,2")
  assert sorted(operation.edits) == [1, 2, 3]
  leaves = random_leaves(source)
  made = operation.apply(leaves)
  assert {path: a.shape for path, a in made.items()} == parameter_shapes(target)
  # The layers became three segments of one.
  blocks = {
    ("segments", 1, "blocks", 0, "block"): ("segments", 0, "blocks", 1, "block"),
    ("segments", 2, "blocks", 0): ("segments", 1, "blocks", 0),
    ("mtp", 0, "segment", "blocks", 0): ("mtp", 0, "segment", "blocks", 0),
  }
  for new, old in blocks.items():
    experts = made[*new, "feed_forward", "experts", "weights", "up"]
    dense = leaves[*old, "feed_forward", "weights", "up"]
    np.testing.assert_array_equal(experts, np.stack([dense] * 3, axis=1))


def test_raw_weights_are_scaled_by_what_they_add_up_to_where_logits_are_equal():
  cases = {
    # E G^2 / K of arXiv 2410.07524, with E copies of G parts.
    3 * 2**2 / 4: (dict(parts=2, **GROUPS), preset("mixtral", num_experts=6, top_k=4)),
    8.0: ({}, preset("switch", num_experts=8)),
    2 / 2: ({}, preset("mixtral", num_experts=4, weighting="raw", score="sigmoid")),
    1 / 2: ({}, preset("mixtral", num_experts=4, weighting="straight_through")),
  }
  for expected, (options, routing) in cases.items():
    if options:
      routing = dataclasses.replace(routing, weighting="raw")
    _, target, _ = upcycled(options, routing)
    assert target.moe.routing.weight_scale == pytest.approx(expected, rel=1e-6)


def test_raw_weights_of_a_router_near_zero_are_exact_to_its_size():
  routing = preset("switch", num_experts=4)
  differences = []
  for std in (1e-2, 1e-5):
    options = dict(router_std=std)
    source, target, operation = upcycled(options, routing)
    leaves, tokens = random_leaves(source), random_tokens(source, 2, 6)
    made = logits_of(target, operation.apply(leaves), tokens)
    differences.append(relative_error(made, logits_of(source, leaves, tokens)))
    (reason,) = approximations(target, UpcycleOptions(**options))
    assert "weighting = raw" in reason
  # Logits of this size change a probability by as much, and a layer's output with it.
  assert differences[1] < 1e-4 < differences[0] < 0.5


def test_virtual_groups_take_one_copy_of_every_part_whatever_the_token():
  _, target, operation = upcycled(
    dict(parts=3, **GROUPS), preset("mixtral", num_experts=9, top_k=3)
  )
  _, layer = one_layer(operation, random_leaves(dense_config()))
  logits = np.random.default_rng(0).normal(size=(50, 8)) @ layer["router", "kernel"]
  chosen = np.argsort(-logits, axis=1, kind="stable")[:, :3]
  assert (np.sort(chosen % 3, axis=1) == [0, 1, 2]).all()
  assert (chosen // 3 == chosen[:, :1] // 3).all()
  assert len(np.unique(chosen[:, 0] // 3)) == 3


def test_reinitialised_units_have_the_statistics_of_what_they_replace():
  config = dense_config(model_dim=64, mlp=dict(hidden_dim=400, bias=True))
  options = dict(reinit=0.25, router_std=0.1)
  source, _, operation = upcycled(options, preset("mixtral", num_experts=3), config)
  shapes = parameter_shapes(source)
  rng = np.random.default_rng(0)
  leaves = {p: rng.normal(0.3, 2.0, s).astype(np.float32) for p, s in shapes.items()}
  dense, layer = one_layer(operation, leaves)
  changed = []
  for expert in range(3):
    up = layer["experts", "weights", "up"][expert]
    units = np.flatnonzero((up != dense["weights", "up"]).any(axis=0))
    assert len(units) == 100
    changed.append(set(units))
    for name, axis in {"gate": 1, "up": 1, "down": 0, "up_bias": 0}.items():
      old, new = dense["weights", name], layer["experts", "weights", name][expert]
      differs = (old != new).any(axis=1 - axis) if old.ndim == 2 else old != new
      assert set(np.flatnonzero(differs)) == set(units)
      drawn, replaced = (np.take(a, units, axis=axis) for a in (new, old))
      # Of n draws the mean is off by sd / sqrt(n) and the deviation by sd / sqrt(2 n): 5 of those.
      error = 5 * replaced.std() / np.sqrt(replaced.size)
      assert abs(drawn.mean() - replaced.mean()) < error
      assert abs(drawn.std() - replaced.std()) < error
    same = layer["experts", "weights", "down_bias"][expert] == dense["weights", "down_bias"]
    assert same.all()
  assert changed[0] != changed[1] != changed[2]


def test_noise_is_relative_to_each_array_and_of_each_expert():
  source, _, operation = upcycled(dict(noise=0.1), preset("mixtral", num_experts=4))
  dense, layer = one_layer(operation, random_leaves(source))
  for name in ("gate", "up", "down"):
    old, new = dense["weights", name], layer["experts", "weights", name]
    noise = (new - old) / np.sqrt(np.mean(old**2))
    # 384 draws: 5 standard errors.
    assert abs(noise.std() - 0.1) < 5 * 0.1 / np.sqrt(2 * noise.size)
    assert not np.array_equal(noise[0], noise[1])


def test_moments_follow_the_parameters_and_those_of_what_is_new_are_zero():
  options = dict(parts=2, shared_parts=1, noise=0.5, reinit=0.5, scaling="weights")
  routing = preset("mixtral", num_experts=2, bias_update="sign")
  source, target, operation = upcycled(options, routing)
  assert target.moe.routing.weight_scale == 1
  # Every element says which hidden unit it belongs to.
  units = np.broadcast_to(np.arange(1.0, 13.0, dtype=np.float32), (8, 12))
  dense = {("weights", "up"): units, ("weights", "gate"): units, ("weights", "down"): units.T}
  for role, factor in {Role.FIRST_MOMENT: 1.0, Role.SECOND_MOMENT: 1.0}.items():
    layer = operation.edits[1](dense, role)
    assert not layer["router", "kernel"].any()
    assert ("router", "bias") not in layer
    for name, axis in {"up": 0, "gate": 0, "down": 1}.items():
      np.testing.assert_array_equal(
        layer["shared", "network", "weights", name],
        np.take(dense["weights", name], range(6), 1 - axis),
      )
      for expert in layer["experts", "weights", name]:
        row = np.take(expert, 0, axis=axis)
        kept = np.flatnonzero(row)
        assert len(kept) == 3
        np.testing.assert_array_equal(row[kept], factor * (7.0 + kept))


def test_moments_are_divided_by_what_scales_their_parameter():
  _, _, operation = upcycled(
    dict(parts=2, scaling="weights", **GROUPS), preset("mixtral", num_experts=4, top_k=2)
  )
  dense = {("weights", name): np.ones((8, 12), np.float32) for name in ("gate", "up")}
  dense["weights", "down"] = np.ones((12, 8), np.float32)
  for role, scale in {Role.VALUE: 2, Role.FIRST_MOMENT: 1 / 2, Role.SECOND_MOMENT: 1 / 4}.items():
    layer = operation.edits[1](dense, role)
    assert (layer["experts", "weights", "down"] == scale).all()
    assert (layer["experts", "weights", "up"] == 1).all()


def test_gradients_reach_router_and_every_copy_that_got_tokens():
  config = dense_config((("attention:dense", 1),))
  source, target, operation = upcycled({}, preset("mixtral", num_experts=4), config, layers="all")
  leaves, tokens = random_leaves(source), random_tokens(source, 4, 12)
  graph, state = nnx.split(model_of(target, operation.apply(leaves)))

  def loss(state):
    logits, aux = nnx.merge(graph, state)(tokens, return_aux=True, train=True)
    return (logits**2).mean() + aux.weighted_loss

  grads = jax.jit(jax.grad(loss))(state)
  ff = nnx.to_pure_dict(grads)["segments"][0]["blocks"][0]["feed_forward"]
  per_expert = np.abs(np.asarray(ff["experts"]["weights"]["down"])).sum(axis=(2, 3))
  assert (per_expert > 0).all()
  assert not np.allclose(per_expert[:, 0], per_expert[:, 1])
  assert np.abs(np.asarray(ff["router"]["kernel"])).sum() > 0


REFUSED = {
  "has experts already": lambda: upcycled({}, preset("mixtral"), tiny_config()),
  "parts = 5 is refused: it must divide the dense hidden_dim = 12": lambda: upcycled(
    dict(parts=5), preset("mixtral")
  ),
  "shared_parts = 2 is refused": lambda: UpcycleOptions(parts=2, shared_parts=2),
  "reinit = 1.5 is refused": lambda: UpcycleOptions(reinit=1.5),
  "noise = -1 is refused": lambda: UpcycleOptions(noise=-1),
  "router_std = 0 is refused": lambda: UpcycleOptions(router_std=0),
  "did you mean 'weights'": lambda: UpcycleOptions(scaling="weight"),
  "num_experts = 5 is refused: it must be a multiple of 2": lambda: upcycled(
    dict(parts=2), preset("mixtral", num_experts=5)
  ),
  "top_k = 3 with selection = top_k is refused": lambda: upcycled(
    dict(parts=2, **GROUPS), preset("mixtral", top_k=3)
  ),
  "top_k = 2 is refused: it must be between 1 and num_experts = 1": lambda: preset(
    "mixtral", num_experts=1
  ),
  "layers = 'every_second' is refused: did you mean every_other?": lambda: choose_layers(
    dense_config(), "every_second"
  ),
  "layers = '4' is refused: the model's layers are 0 to 3": lambda: choose_layers(
    dense_config(), "4"
  ),
  "weight_on = input is refused": lambda: upcycled({}, preset("mixtral", weight_on="input")),
  "selection = soft is refused": lambda: upcycled(
    {}, RoutingConfig(4, selection="soft", capacity=1, balance_loss_weight=0.0)
  ),
  "score = relu is refused": lambda: upcycled({}, preset("mixtral", weighting="raw", score="relu")),
}


@pytest.mark.parametrize("sentence, faulty", REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_upcycled_is_refused(sentence, faulty):
  with pytest.raises(UserError) as refusal:
    faulty()
  assert sentence in str(refusal.value)


TOTALS = [
  preset("mixtral", weighting=weighting, score=score, top_k=3, weight_norm_order=order)
  for weighting, score, order in (
    ("softmax_selected", "softmax", 1.0),
    ("renormalized", "sigmoid", 2.0),
    ("raw", "softmax", 1.0),
    ("raw", "sqrt_softplus", 1.0),
    ("straight_through", "sigmoid", 1.0),
  )
]


@pytest.mark.parametrize("routing", TOTALS, ids=lambda routing: str(routing.weighting))
def test_the_total_of_weights_is_that_of_equal_logits(routing):
  shape = (1, 1, routing.num_experts)
  experts = jnp.arange(3).reshape(1, 1, 3)
  scores = score_logits(jnp.zeros(shape), routing)
  weights = weigh(scores, jnp.zeros(shape), experts, experts >= 0, routing)
  assert weight_total(routing) == pytest.approx(float(weights.sum()), rel=1e-6)
