"""Pruning, merging and growing: known experts go where they should, router columns with them."""

import jax
import numpy as np
import pytest
from comparison import relative_error
from surgery_cases import experts_output, random_leaves
from tiny_models import tiny_config

from moe_jax.convert.rules import parameter_shapes
from moe_jax.convert.surgery import (
  Alignment,
  Member,
  NewExpert,
  Role,
  Similarity,
  expert_operation,
  grown,
  kept,
  merged,
  moe_layers,
  resized_config,
  weight_norms,
  without,
)
from moe_jax.errors import UserError

KEY = jax.random.key(3)
CONFIG = tiny_config(moe=dict(expert_bias=True), routing=dict(bias_update="sign", top_k=1))
EXPERTS = ("experts", "weights")


def members(experts):
  """Returns the ids and shares that new experts are made of."""
  return [[(m.expert, round(m.share, 6)) for m in new.members] for new in experts]


def first_layer(config=CONFIG, seed=0):
  return moe_layers(random_leaves(config, seed), config)[0]


def changed(experts, config=CONFIG, role=Role.VALUE, layer=None):
  """Returns the first MoE layer after the operation, from a random one unless given."""
  layer = first_layer(config) if layer is None else layer
  target = resized_config(config, len(experts))
  return expert_operation(config, target, [experts] * 2, KEY).edits[1](layer, role)


def test_pruning_keeps_experts_columns_and_biases_in_their_order():
  old, made = first_layer(), changed(kept(np.array([5, 1, 9, 7]), 2))
  for path in made:
    if path[:2] == EXPERTS:
      np.testing.assert_array_equal(made[path], old[path][[2, 3]])
  np.testing.assert_array_equal(made["router", "kernel"], old["router", "kernel"][:, [2, 3]])
  np.testing.assert_array_equal(made["router", "bias"], old["router", "bias"][[2, 3]])


def test_pruning_a_whole_model_gives_the_shapes_of_its_config():
  leaves, target = random_leaves(CONFIG), resized_config(CONFIG, 3)
  operation = expert_operation(CONFIG, target, [without(4, [0]), without(4, [3])], KEY)
  made = operation.apply(leaves)
  assert {path: a.shape for path, a in made.items()} == parameter_shapes(target)
  path = ("segments", 0, "blocks", 1, "feed_forward", "router", "kernel")
  np.testing.assert_array_equal(made[path][0], leaves[path][0][:, 1:])
  np.testing.assert_array_equal(made[path][1], leaves[path][1][:, :3])


def test_moments_are_pruned_like_their_parameters():
  layer = {path: a for path, a in first_layer().items() if path != ("router", "bias")}
  made = changed(without(4, [1]), role=Role.SECOND_MOMENT, layer=layer)
  assert made.keys() == layer.keys()
  np.testing.assert_array_equal(made[EXPERTS + ("up",)], layer[EXPERTS + ("up",)][[0, 2, 3]])


def test_columns_of_null_experts_stay_behind_the_others():
  config = tiny_config(routing=dict(num_null_experts=2))
  old, made = first_layer(config), changed(without(4, [0, 2]), config)
  np.testing.assert_array_equal(made["router", "kernel"], old["router", "kernel"][:, [1, 3, 4, 5]])


def test_weight_norms_are_of_all_arrays_of_an_expert():
  layer = first_layer()
  arrays = [a.astype(np.float64) for path, a in layer.items() if path[:2] == EXPERTS]
  expected = np.sqrt([sum(np.sum(a[e] ** 2) for a in arrays) for e in range(4)])
  np.testing.assert_allclose(weight_norms(layer), expected, rtol=1e-12)


def similar_layer():
  """Returns a layer in which expert 3 is nearly 0 by weights, and nearly 1 by router columns."""
  layer, rng = first_layer(), np.random.default_rng(0)
  layer = {path: a.copy() for path, a in layer.items()}
  for path in layer:
    if path[:2] == EXPERTS:
      layer[path][3] = layer[path][0] + 0.01 * rng.normal(size=layer[path][0].shape)
  layer["router", "kernel"][:, 3] = 1.1 * layer["router", "kernel"][:, 1]
  return layer


def test_experts_join_the_leader_that_they_are_most_like_weighted_by_use():
  usage = np.array([30, 40, 50, 10])
  by_weights = merged(similar_layer(), usage, 3, Similarity.WEIGHTS, Alignment.NONE)
  assert members(by_weights) == [[(0, 0.75), (3, 0.25)], [(1, 1.0)], [(2, 1.0)]]
  by_router = merged(similar_layer(), usage, 3, Similarity.ROUTER, Alignment.NONE)
  assert members(by_router) == [[(0, 1.0)], [(1, 0.8), (3, 0.2)], [(2, 1.0)]]


def test_a_cluster_without_use_is_a_plain_mean():
  made = merged(similar_layer(), np.zeros(4), 3, Similarity.WEIGHTS, Alignment.NONE)
  assert members(made) == [[(0, 0.5), (3, 0.5)], [(1, 1.0)], [(2, 1.0)]]


def test_merging_averages_experts_and_columns_in_float64_oracle():
  layer, usage = similar_layer(), np.array([30, 40, 50, 10])
  experts = merged(layer, usage, 3, Similarity.WEIGHTS, Alignment.NONE)
  made = changed(experts, layer=layer)
  for path in (EXPERTS + ("down",), EXPERTS + ("up_bias",)):
    old = layer[path].astype(np.float64)
    np.testing.assert_allclose(made[path][0], 0.75 * old[0] + 0.25 * old[3], rtol=1e-6, atol=1e-8)
  old = layer["router", "kernel"].astype(np.float64)
  expected = 0.75 * old[:, 0] + 0.25 * old[:, 3]
  np.testing.assert_allclose(made["router", "kernel"][:, 0], expected, rtol=1e-6, atol=1e-8)


def shuffled_twin():
  """Returns a layer whose expert 1 is expert 0 with its hidden units in another order."""
  layer = {path: a.copy() for path, a in first_layer().items()}
  order = np.random.default_rng(1).permutation(6)
  for name, axis in {"gate": -1, "up": -1, "gate_bias": -1, "up_bias": -1, "down": 0}.items():
    layer[EXPERTS + (name,)][1] = np.take(layer[EXPERTS + (name,)][0], order, axis=axis)
  layer[EXPERTS + ("down_bias",)][1] = layer[EXPERTS + ("down_bias",)][0]
  layer["router", "kernel"][:, 1] = layer["router", "kernel"][:, 0]
  return layer


@pytest.mark.parametrize("align", Alignment)
def test_alignment_undoes_a_permutation_of_hidden_units(align):
  layer, x = shuffled_twin(), np.random.default_rng(0).normal(size=(9, 8))
  # Expert 1 is used least and is most like expert 0.
  experts = merged(layer, np.array([9, 1, 8, 7]), 3, Similarity.ROUTER, align)
  assert members(experts) == [[(0, 0.9), (1, 0.1)], [(2, 1.0)], [(3, 1.0)]]
  made = experts_output(x, changed(experts, layer=layer), resized_config(CONFIG, 3).moe)
  error = relative_error(made, experts_output(x, layer, CONFIG.moe))
  # A mean of two equal experts, in float32; without alignment it is another network.
  assert error < 1e-6 if align == Alignment.PERMUTATION else error > 1e-2


def test_growing_copies_the_most_used_experts_in_turn():
  experts = grown(np.array([1, 7, 3]), 5, copies=True, noise=0.25)
  assert members(experts) == [[(0, 1.0)], [(1, 1.0)], [(2, 1.0)], [(1, 1.0)], [(2, 1.0)]]
  assert [new.noise for new in experts] == [0, 0, 0, 0.25, 0.25]


def test_a_copy_without_noise_changes_nothing_where_a_token_has_one_expert():
  layer, x = first_layer(), np.random.default_rng(0).normal(size=(9, 8))
  made = changed(grown(np.array([1, 7, 3, 0]), 6, copies=True, noise=0.0), layer=layer)
  expected = experts_output(x, layer, CONFIG.moe)
  # Ties go to the original, whose weights are the same numbers.
  np.testing.assert_array_equal(experts_output(x, made, resized_config(CONFIG, 6).moe), expected)


def test_noise_of_a_copy_is_relative_to_what_it_is_added_to():
  layer = first_layer()
  experts = [*grown(np.array([9, 1, 1, 1]), 4, copies=True, noise=0.0)]
  made = changed(experts + [NewExpert((Member(0),), 0.1)], layer=layer)
  for path, axis in {EXPERTS + ("up",): 0, ("router", "kernel"): 1}.items():
    old, new = np.take(layer[path], 0, axis), np.take(made[path], 4, axis)
    ratio = np.std(new - old) / np.sqrt(np.mean(old**2))
    # 8 numbers or more: within five standard errors.
    assert abs(ratio - 0.1) < 5 * 0.1 / np.sqrt(2 * old.size)


def test_fresh_experts_are_as_at_initialisation_and_have_no_moments():
  layer = first_layer()
  made = changed(grown(np.zeros(4), 6, copies=False, noise=0.0), layer=layer)
  assert made[EXPERTS + ("up",)].shape[0] == 6
  assert not made[EXPERTS + ("up_bias",)][4:].any()
  assert not np.array_equal(made[EXPERTS + ("up",)][4], made[EXPERTS + ("up",)][5])
  # They compete at the mean of the selection biases.
  np.testing.assert_allclose(made["router", "bias"][4:], layer["router", "bias"].mean(), rtol=1e-6)
  moments = {path: a for path, a in layer.items() if path != ("router", "bias")}
  made = changed(
    grown(np.zeros(4), 6, copies=False, noise=0.0), role=Role.FIRST_MOMENT, layer=moments
  )
  assert not made[EXPERTS + ("up",)][4:].any() and not made["router", "kernel"][:, 4:].any()
  np.testing.assert_array_equal(made["router", "kernel"][:, :4], layer["router", "kernel"])


REFUSED = {
  "expert 4 does not exist; the layer's are 0 to 3": lambda: without(4, [4]),
  "no expert would be left": lambda: without(2, [0, 1]),
  "has no experts; expected a model with some": lambda: resized_config(
    tiny_config(segments=(("attention:dense", 1),), moe=None), 2
  ),
  "top_k = 2 is refused: it must be between 1 and num_experts = 1": lambda: resized_config(
    tiny_config(), 1
  ),
  "selection = hash with num_expert_groups = 1 is refused": lambda: resized_config(
    tiny_config(routing=dict(selection="hash")), 3
  ),
  "num_expert_groups = 2 is refused": lambda: resized_config(
    tiny_config(routing=dict(num_expert_groups=2, top_expert_groups=1)), 3
  ),
  "experts are given for 1 layers; the model has 2": lambda: expert_operation(
    CONFIG, resized_config(CONFIG, 3), [without(4, [0])], KEY
  ),
}


@pytest.mark.parametrize("sentence, faulty", REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_done_is_refused(sentence, faulty):
  with pytest.raises(UserError) as refusal:
    faulty()
  assert sentence in str(refusal.value)
