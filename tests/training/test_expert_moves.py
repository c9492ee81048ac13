"""Moving experts: the model computes what it did, and all that belongs to an expert goes along."""

import functools

import jax
import numpy as np
import optax
import pytest
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from sharding.meshes import mesh_layout
from training import tiny
from training.steps import drawn_state, fresh, make_batch

from moe_jax.errors import UserError
from moe_jax.models.run_batch import run_batch
from moe_jax.training.expert_moves import move_experts
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.placed import compile_for, place_batch
from moe_jax.training.state import model_graph, state_shardings

E = 8


@functools.cache
def experiment(**fields):
  return tiny.experiment(
    **{
      "model__segments": (("attention:moe", 2),),
      "model__vocab_size": 264,
      "model__num_kv_heads": 2,
      "moe__num_experts": E,
      "moe__top_k": 2,
      "moe__score": "sigmoid",
      "moe__weighting": "renormalized",
      "moe__bias_update": "sign",
      "moe__overflow": "dropless",
      "repair__every": 100,
      "balance_placement__every": 100,
      "balance_placement__devices": 4,
    }
    | fields
  )


def orders(seed: int = 0, groups: int = 1) -> np.ndarray:
  """Returns (2, E): random orders that keep groups together."""
  rng, size = np.random.default_rng(seed), E // groups
  rows = ([g * size + rng.permutation(size) for g in rng.permutation(groups)] for _ in range(2))
  return np.stack([np.concatenate(row) for row in rows])


def forward(config, layout=None):
  def run(model, batch):
    logits, aux = run_batch(nnx.merge(model_graph(config.model), model), batch)
    return logits, [plan.metrics["load"] for plan in aux.plans]

  return compile_for(layout, run)


def assert_same_model(run, state, moved, order, batch, tolerance):
  logits, loads = jax.device_get(run(state.model, batch))
  new_logits, new_loads = jax.device_get(run(moved.model, batch))
  np.testing.assert_allclose(new_logits, logits, atol=tolerance * np.abs(logits).max(), rtol=0)
  for load, new, row in zip(loads, new_loads, order, strict=True):
    np.testing.assert_array_equal(new, load[row])
    assert np.ptp(load) > 0


CASES = {
  # Scores of each expert by itself: nothing sums over experts, so not a bit may change.
  "groups, affine": (
    dict(moe__projection="affine", moe__num_expert_groups=4, moe__top_expert_groups=2),
    4,
    0.0,
  ),
  "null experts": (dict(moe__num_null_experts=2), 1, 0.0),
  # A softmax sums over experts in their order, which float32 notices.
  "softmax, drops": (dict(moe__score="softmax", moe__overflow="drop"), 1, 1e-5),
  "gates": (
    dict(
      moe__selection="hierarchical",
      moe__score="softmax",
      moe__bias_update="none",
      moe__num_expert_groups=4,
      moe__top_expert_groups=2,
    ),
    4,
    1e-5,
  ),
  "table": (
    dict(moe__selection="table", moe__top_k=1, moe__bias_update="none", repair__every=0),
    1,
    0.0,
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_model_computes_what_it_did(name):
  fields, groups, tolerance = CASES[name]
  config, order, optimizer = experiment(**fields), orders(groups=groups), optax.identity()
  state = drawn_state(config, optimizer)
  moved = move_experts(fresh(state), order, config.model, optimizer)
  assert_same_model(forward(config), state, moved, order, make_batch(), tolerance)


def test_on_a_mesh_experts_change_devices_and_nothing_else():
  config, order = experiment(moe__grouping="fixed", moe__group_size=32), orders()
  optimizer, layout = optax.identity(), mesh_layout("ep_fsdp")
  state = drawn_state(config, optimizer)
  state = jax.device_put(state, state_shardings(state, layout))
  moved = move_experts(fresh(state), order, config.model, optimizer)
  for new, old in zip(jax.tree.leaves(moved), jax.tree.leaves(state), strict=True):
    assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
  batch = place_batch(make_batch(rows=8), layout)
  assert_same_model(forward(config, layout), state, moved, order, batch, 1e-6)


@pytest.mark.parametrize("name, per_array", [("adamw", 2), ("adafactor", 1)])
def test_everything_of_an_expert_goes_along(name, per_array):
  config, order = experiment(optimizer__name=name), orders()
  optimizer = make_optimizer(config.optimizer, config.steps)
  state = drawn_state(config, optimizer)
  moved = move_experts(fresh(state), order, config.model, optimizer)
  changed = 0
  leaves = zip(jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(state), strict=True)
  for (path, new), old in leaves:
    if not np.array_equal(new, old):
      changed, old = changed + 1, np.asarray(old)
      axis = old.shape.index(E)
      expected = [np.take(a, row, axis - 1) for a, row in zip(old, order, strict=True)]
      np.testing.assert_array_equal(new, np.stack(expected), err_msg=str(path))
  # Two weights and a router kernel, and what is kept of them; a bias, two windows, the numbers.
  assert changed == 3 * (1 + per_array) + 4


def test_moves_one_after_the_other_add_up_in_the_numbers_at_birth():
  config, optimizer = experiment(), optax.identity()
  state = drawn_state(config, optimizer)
  born = np.asarray(state.placement.born)
  first, second = orders(1), orders(2)
  moved = move_experts(fresh(state), first, config.model, optimizer)
  moved = move_experts(moved, second, config.model, optimizer)
  both = np.take_along_axis(first, second, axis=1)
  np.testing.assert_array_equal(moved.placement.born, np.take_along_axis(born, both, axis=1))


@pytest.mark.parametrize(
  "fields, order, match",
  [
    (dict(), np.zeros((2, E), int), "every row must name each of the 8 experts once"),
    (
      dict(moe__num_expert_groups=4, moe__top_expert_groups=2),
      np.roll(np.tile(np.arange(E), (2, 1)), 1, axis=1),
      r"row 0 of order .* groups \[0, 3\] into the places of group 0",
    ),
  ],
)
def test_an_order_that_cannot_be_is_refused(fields, order, match):
  with pytest.raises(UserError, match=match):
    move_experts(None, order, experiment(**fields).model, None)


@pytest.mark.parametrize(
  "fields, match",
  [
    (dict(moe__selection="hash"), "selection = hash, which names them by number"),
    (dict(moe__selection="random"), "selection = random, which names them by number"),
    (dict(moe__selection="table"), "selection = table and top_k = 2"),
    (
      dict(moe__selection="expert_choice", moe__weighting="raw", moe__overflow="drop"),
      "selection = expert_choice, where each has as many",
    ),
  ],
)
def test_experts_with_a_number_of_their_own_are_not_moved(fields, match):
  with pytest.raises(UserError, match=match):
    experiment(moe__bias_update="none", repair__every=0, **fields)
