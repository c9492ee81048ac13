"""Every refusal is one sentence that names the value and what to write instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.moe import MoEConfig, MoELayer, RoutingConfig, preset, route


def message(call, *arguments, **options):
  """Returns the text of the refusal, which is a single line."""
  with pytest.raises(UserError) as error:
    call(*arguments, **options)
  text = str(error.value)
  assert "\n" not in text
  return text


@pytest.mark.parametrize(
  ("fields", "value", "remedy"),
  [
    ({"num_experts": 0}, "num_experts = 0", "at least 1"),
    ({"num_experts": -8}, "num_experts = -8", "at least 1"),
    ({"num_experts": 8.0}, "num_experts = 8.0", "integer"),
    ({"num_experts": "8"}, "num_experts = '8'", "integer"),
    ({"top_k": 0}, "top_k = 0", "between 1 and num_experts = 4"),
    ({"top_k": 5}, "top_k = 5", "between 1 and num_experts = 4"),
    ({"top_k": 1.5}, "top_k = 1.5", "integer"),
    ({"capacity": 0}, "capacity = 0", "at least 1, or None"),
    ({"capacity": 2.5}, "capacity = 2.5", "integer"),
    ({"capacity_factor": 0.0}, "capacity_factor = 0.0", "greater than 0"),
    ({"capacity_factor": float("nan")}, "capacity_factor = nan", "greater than 0"),
    ({"capacity_factor": float("inf")}, "capacity_factor = inf", "overflow = dropless"),
    ({"eval_capacity_factor": -1.0}, "eval_capacity_factor = -1.0", "greater than 0"),
    ({"capacity_factor": "big"}, "capacity_factor = 'big'", "number"),
    ({"min_capacity": 0}, "min_capacity = 0", "at least 1"),
    ({"capacity_multiple": 0}, "capacity_multiple = 0", "at least 1"),
    ({"balance_loss_weight": -0.1}, "balance_loss_weight = -0.1", "0 or greater"),
    ({"z_loss_weight": -0.1}, "z_loss_weight = -0.1", "0 or greater"),
    ({"selection": "random_second", "top_k": 1}, "top_k = 1", "2 with selection"),
    ({"selection": "random_second", "top_k": 3}, "top_k = 3", "2 with selection"),
    ({"grouping": "fixed"}, "group_size = None", "at least 1 with grouping = fixed"),
    ({"grouping": "fixed", "group_size": 0}, "group_size = 0", "at least 1"),
    ({"group_size": 8}, "group_size = 8", "set grouping = fixed"),
    ({"grouping": "sequence", "group_size": 8}, "group_size = 8", "set grouping = fixed"),
  ],
)
def test_a_router_that_cannot_be_is_refused(fields, value, remedy):
  text = message(RoutingConfig, **{"num_experts": 4, **fields})
  assert value in text and remedy in text


@pytest.mark.parametrize(
  ("name", "value", "nearest"),
  [
    ("selection", "topk", "top_k"),
    ("weighting", "renormalised", "renormalized"),
    ("capacity_convention", "per_tokens", "per_token"),
    ("capacity_rounding", "round", "round_half_even"),
    ("overflow", "dropped", "drop"),
    ("drop_order", "choice-major", "choice_major"),
    ("priority", "max-score", "max_score"),
    ("grouping", "batches", "batch"),
    ("balance_fraction", "all", "all_choices"),
    ("balance_scope", "groups", "group"),
    ("loss_padding", "excluded", "exclude"),
  ],
)
def test_an_unknown_choice_names_the_valid_ones(name, value, nearest):
  text = message(RoutingConfig, num_experts=4, **{name: value})
  assert f"{name} = {value!r}" in text and nearest in text


@pytest.mark.parametrize(
  ("fields", "value", "remedy"),
  [
    ({"dispatch": "gathered"}, "dispatch = 'gathered'", "gather"),
    ({"activation": "swish"}, "activation = 'swish'", "silu"),
    ({"hidden_dim": 0}, "hidden_dim = 0", "at least 1"),
    ({"expert_dropout": 1.0}, "expert_dropout = 1.0", "[0, 1)"),
    ({"router_jitter": 1.0}, "router_jitter = 1.0", "[0, 1)"),
    ({"router_jitter": -0.1}, "router_jitter = -0.1", "[0, 1)"),
  ],
)
def test_a_layer_that_cannot_be_is_refused(fields, value, remedy):
  text = message(MoEConfig, **{"routing": RoutingConfig(4), "hidden_dim": 8, **fields})
  assert value in text and remedy in text


def test_an_unknown_preset_names_the_nearest():
  text = message(preset, "mixtrl")
  assert "'mixtrl'" in text and "did you mean mixtral?" in text


def test_an_unknown_field_of_a_preset_names_the_nearest():
  text = message(preset, "switch", num_expert=4)
  assert "'num_expert'" in text and "did you mean num_experts?" in text


@pytest.mark.parametrize("shape", [(6, 4), (2, 6, 5), (1, 2, 6, 4)])
def test_logits_of_another_shape_are_refused(shape):
  text = message(route, jnp.zeros(shape), RoutingConfig(4))
  assert str(shape) in text and "num_experts = 4" in text


@pytest.mark.parametrize(
  "mask", [np.ones((2, 5), bool), np.ones((6, 2), bool), np.ones((2, 6)), np.ones((2, 6), int)]
)
def test_a_mask_of_another_shape_or_type_is_refused(mask):
  text = message(route, jnp.zeros((2, 6, 4)), RoutingConfig(4), token_mask=mask)
  assert str(mask.shape) in text and str(mask.dtype) in text and "(2, 6) and bool" in text


@pytest.mark.parametrize("grouping", [{}, {"grouping": "fixed", "group_size": 4}])
def test_the_layer_refuses_a_transposed_mask_that_groups_would_hide(grouping):
  layer = MoELayer(8, MoEConfig(RoutingConfig(4, **grouping), 8), key=jax.random.key(0))
  text = message(layer, jnp.zeros((2, 6, 8)), token_mask=np.ones((6, 2), bool))
  assert "(6, 2)" in text and "(2, 6)" in text
