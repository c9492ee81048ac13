"""Every refusal is one sentence that names the value and what to write instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.moe import (
  MoEConfig,
  MoELayer,
  RoutingConfig,
  preset,
  register_selection,
  registry,
  route,
)


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
    ({"balance_loss_weight": float("inf")}, "balance_loss_weight = inf", "finite"),
    ({"z_loss_weight": float("inf")}, "z_loss_weight = inf", "finite"),
    ({"adaptive_factor": float("inf")}, "adaptive_factor = inf", "finite"),
    ({"hash_seed": -1}, "hash_seed = -1", "[0, 2^32)"),
    ({"hash_seed": 2**32}, "hash_seed = 4294967296", "[0, 2^32)"),
    ({"selection": "random_second", "top_k": 1}, "top_k = 1", "2 with selection"),
    ({"selection": "random_second", "top_k": 3}, "top_k = 3", "2 with selection"),
    ({"selection": "threshold_second", "top_k": 1}, "top_k = 1", "2 with selection"),
    ({"num_null_experts": -1}, "num_null_experts = -1", "0 or greater"),
    ({"num_null_experts": 2, "top_k": 7}, "top_k = 7", "between 1 and num_experts + num_null"),
    ({"num_null_experts": 1, "overflow": "reroute"}, "overflow = reroute", "drop or dropless"),
    ({"num_expert_groups": 3}, "num_expert_groups = 3", "divisor of num_experts = 4"),
    ({"num_expert_groups": 0}, "num_expert_groups = 0", "at least 1"),
    ({"top_expert_groups": 2}, "top_expert_groups = 2", "between 1 and num_expert_groups = 1"),
    ({"num_expert_groups": 2, "top_k": 3}, "top_k = 3", "at most 2, the experts in 1 groups of 2"),
    (
      {"num_expert_groups": 4, "group_score": "top2_sum"},
      "group_score = top2_sum",
      "max with a single expert per group",
    ),
    ({"num_expert_groups": 2, "num_null_experts": 1}, "num_null_experts = 1", "0 with"),
    (
      {"selection": "hierarchical", "num_expert_groups": 2, "top_expert_groups": 2, "top_k": 3},
      "top_k = 3",
      "a multiple of top_expert_groups = 2",
    ),
    ({"selection": "hierarchical", "score": "sigmoid"}, "score = sigmoid", "softmax with"),
    ({"weighting": "sparsemixer"}, "weighting = sparsemixer", "selection = sparsemixer"),
    ({"load_loss_weight": 0.1}, "load_loss_weight = 0.1", "0 without gaussian or learned noise"),
    (
      {"load_loss_weight": 0.1, "noise": "learned", "selection": "sample"},
      "load_loss_weight = 0.1",
      "0 with num_null_experts > 0 or a selection that is not top_k",
    ),
    (
      {"load_loss_weight": 0.1, "noise": "gaussian", "bias_update": "sign"},
      "load_loss_weight = 0.1",
      "0 with bias_update other than none",
    ),
    (
      {"load_loss_weight": 0.1, "noise": "gaussian", "num_expert_groups": 2},
      "load_loss_weight = 0.1",
      "top_expert_groups < num_expert_groups",
    ),
    ({"noise_std": 0.0}, "noise_std = 0.0", "greater than 0"),
    ({"weight_scale": 0}, "weight_scale = 0", "greater than 0"),
    ({"weight_norm_order": -1.0}, "weight_norm_order = -1.0", "greater than 0"),
    ({"second_threshold": -0.1}, "second_threshold = -0.1", "0 or greater"),
    ({"reroute_attempts": 0}, "reroute_attempts = 0", "at least 1"),
    ({"hash_ngram": 0}, "hash_ngram = 0", "at least 1"),
    ({"adaptive_factor": 1.0}, "adaptive_factor = 1.0", "greater than 1"),
    ({"adaptive_target": 0.0}, "adaptive_target = 0.0", "greater than 0, or None"),
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
    ("projection", "normalised", "normalized"),
    ("score", "soft_max", "softmax"),
    ("noise", "gauss", "gaussian"),
    ("granularity", "sequence", "segment"),
    ("null_expert", "zeros", "zero"),
    ("group_score", "top_2_sum", "top2_sum"),
    ("bias_update", "signs", "sign"),
    ("weight_on", "inputs", "input"),
    ("balance_source", "dispatched", "dispatch"),
    ("importance", "weight", "weights"),
    ("load_threshold", "exclude", "exclude_self"),
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


def test_an_unknown_selection_names_the_nearest():
  text = message(RoutingConfig, num_experts=4, selection="topk")
  assert "selection = topk" in text and "did you mean top_k?" in text


def test_a_name_of_a_selection_is_taken_once():
  text = message(register_selection("top_k"), lambda view, config: None)
  assert "'top_k'" in text and "another name" in text


@pytest.mark.parametrize(
  ("chooser", "name"), [("token", "TokenChoice"), ("expert", "ExpertChoice")]
)
def test_a_selection_that_returns_no_choice_is_refused(chooser, name, monkeypatch):
  def ids_alone(view, config):
    return jnp.zeros((*view.mask.shape, config.top_k), jnp.int32)

  selector = registry.Selector(ids_alone, chooser=registry.Chooser(chooser))
  monkeypatch.setitem(registry._SELECTORS, "ids_alone", selector)
  text = message(route, jnp.zeros((2, 6, 4)), RoutingConfig(4, selection="ids_alone"))
  assert "selection = ids_alone" in text and name in text and chooser in text


RANKLESS = ("sample", "random", "hash", "table", "positive", "hierarchical")


@pytest.mark.parametrize("selection", RANKLESS)
@pytest.mark.parametrize(
  "fields",
  [
    {"bias_update": "sign"},
    {"overflow": "reroute"},
    {"num_null_experts": 1},
    {"num_expert_groups": 2},
  ],
)
def test_what_needs_a_ranking_is_refused_where_experts_are_not_ranked(fields, selection):
  if selection == "hierarchical" and "num_expert_groups" in fields:
    return
  ((name, value),) = fields.items()
  text = message(RoutingConfig, num_experts=4, selection=selection, **fields)
  assert f"{name} = {value}" in text and f"selection = {selection}" in text


@pytest.mark.parametrize(
  ("fields", "value", "remedy"),
  [
    ({"dispatch": "gathered"}, "dispatch = 'gathered'", "gather"),
    ({"activation": "swish"}, "activation = 'swish'", "silu"),
    ({"router_dtype": "float16"}, "router_dtype = 'float16'", "bfloat16"),
    ({"hidden_dim": 0}, "hidden_dim = 0", "at least 1"),
    ({"expert_dropout": 1.0}, "expert_dropout = 1.0", "[0, 1)"),
    ({"router_jitter": 1.0}, "router_jitter = 1.0", "[0, 1)"),
    ({"router_jitter": -0.1}, "router_jitter = -0.1", "[0, 1)"),
    ({"shared_hidden_dim": -1}, "shared_hidden_dim = -1", "0 or greater"),
    ({"shared_combine": "sum"}, "shared_combine = 'sum'", "coefficient"),
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


@pytest.mark.parametrize("shape", [(6, 4), (2, 6, 5), (1, 2, 6, 4), (2, 0, 4), (0, 6, 4)])
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


@pytest.mark.parametrize(
  ("fields", "more", "fragments"),
  [
    ({"selection": "hash"}, {}, ("selection = hash", "token_ids: None")),
    ({"selection": "table"}, {"token_ids": np.zeros((6, 2), int)}, ("(6, 2)", "(2, 6)")),
    ({"selection": "table"}, {"token_ids": np.zeros((2, 6))}, ("float64", "integers")),
    ({"granularity": "segment"}, {}, ("granularity = segment", "segment_ids: None")),
    ({"balance_scope": "sequence"}, {}, ("balance_scope = sequence", "segment_ids: None")),
    ({}, {"segment_ids": np.zeros((2, 5), int)}, ("segment_ids", "(2, 5)", "(2, 6)")),
    ({}, {"bias": np.zeros((5,))}, ("bias", "(5,)", "(4,)")),
    ({}, {"global_load": np.ones((1,))}, ("global_load", "(1,)", "(4,)")),
    ({"selection": "hash"}, {"bias": np.zeros(4), "token_ids": np.zeros((2, 6), int)}, ("bias",)),
    ({"num_null_experts": 2}, {}, ("(2, 6, 4)", "6 logits for num_experts = 4")),
  ],
)
def test_arguments_that_a_router_needs_are_asked_for(fields, more, fragments):
  text = message(route, jnp.zeros((2, 6, 4)), RoutingConfig(4, **fields), **more)
  assert all(fragment in text for fragment in fragments), text


@pytest.mark.parametrize("scale", [None, np.ones((2, 6, 5)), np.ones((6, 4))])
def test_learned_noise_needs_a_scale_for_every_logit(scale):
  config = RoutingConfig(4, noise="learned")
  key = jax.random.key(0)
  text = message(route, jnp.zeros((2, 6, 4)), config, noise_scale=scale, key=key, train=True)
  assert "noise_scale" in text and "(2, 6, 4)" in text


@pytest.mark.parametrize(
  ("fields", "name"),
  [
    ({"noise": "gumbel"}, "noise = gumbel"),
    ({"selection": "sample"}, "selection = sample"),
    ({"selection": "random"}, "selection = random"),
    ({"priority": "random"}, "priority = random"),
  ],
)
def test_training_names_what_needs_the_key(fields, name):
  text = message(route, jnp.zeros((2, 6, 4)), RoutingConfig(4, **fields), train=True)
  assert name in text and "jax.random.key" in text
