"""A model's tables of experts: made from the training text, different by layer, used everywhere."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from comparison import relative_error
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from tiny_models import tiny_config

from moe_jax.inference import generate
from moe_jax.models import Decoder
from moe_jax.training.state import init_state, model_graph
from moe_jax.training.tables import fill_tables, token_counts

V, E = 13, 4
CONFIG = tiny_config(routing=dict(selection="table", top_k=1, weighting="raw"))
# Zipf's law, and two places of padding.
TOKENS = np.repeat(np.arange(V), 60 // np.arange(1, V + 1)).astype(np.int32)
RECORDS = [
  {"tokens": TOKENS, "segment_ids": np.ones_like(TOKENS)},
  {"tokens": np.array([5, 7, 7], np.int32), "segment_ids": np.array([1, 0, 0], np.int32)},
]


@pytest.fixture(scope="module")
def state():
  return fill_tables(init_state(CONFIG, optax.sgd(0.1), 0), CONFIG, RECORDS)


def tables_of(state):
  """Returns (MoE layers, V)."""
  ((_, table),) = nnx.to_flat_state(state.router_state)
  return np.asarray(table.get_value())


def test_tokens_are_counted_without_padding():
  counts = token_counts(RECORDS, V)
  np.testing.assert_array_equal(counts, np.bincount(TOKENS, minlength=V) + (np.arange(V) == 5))


def test_every_layer_has_a_balanced_table_of_its_own(state):
  first, second = tables_of(state)
  counts = token_counts(RECORDS, V)
  for table in (first, second):
    loads = np.bincount(table, weights=counts, minlength=E)
    # The most frequent id alone is more than a fair share; the others share the rest evenly.
    assert loads.max() == counts[0] and np.ptp(np.sort(loads)[:-1]) <= 3
  assert np.any(first != second)
  again = fill_tables(init_state(CONFIG, optax.sgd(0.1), 7), CONFIG, RECORDS)
  np.testing.assert_array_equal(tables_of(again), tables_of(state))
  other = CONFIG.with_routing(hash_seed=1)
  assert np.any(tables_of(fill_tables(state, other, RECORDS)) != tables_of(state))


def test_tokens_go_to_the_experts_of_the_table(state):
  tokens = np.random.default_rng(0).integers(0, V, (2, 6)).astype(np.int32)
  mask = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]], bool)
  model = nnx.merge(model_graph(CONFIG), state.model)
  _, aux = model(np.where(mask, tokens, -1), token_mask=mask, return_aux=True)
  for plan, table in zip(aux.plans, tables_of(state), strict=True):
    expert = np.reshape(plan.expert, tokens.shape)
    np.testing.assert_array_equal(expert[mask], table[tokens][mask])
  assert relative_error(model(tokens)[0], model(tokens[:1])[0]) <= 1e-5


def test_generation_with_and_without_a_cache_uses_the_table(state):
  model = nnx.merge(model_graph(CONFIG), state.model)
  prompts = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
  cached = generate(model, prompts, 4)
  np.testing.assert_array_equal(cached, generate(model, prompts, 4, use_cache=False))


def test_before_any_data_the_ids_are_spread_evenly():
  model = Decoder(CONFIG, key=jax.random.key(0))
  ((_, table),) = nnx.to_flat_state(nnx.split(model, nnx.Param, ...)[2])
  for row in np.asarray(table.get_value()):
    assert np.ptp(np.bincount(row, minlength=E)) <= 1


def test_other_routers_keep_their_state():
  config = tiny_config(routing=dict(bias_update="sign"))
  state = init_state(config, optax.sgd(0.1), 0)
  assert fill_tables(state, config, RECORDS) is state
  dense = dataclasses.replace(tiny_config(segments=(("attention:dense", 1),)), moe=None)
  assert fill_tables(state, dense, RECORDS) is state
