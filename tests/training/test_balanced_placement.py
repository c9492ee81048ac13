"""Balancing devices in training: measured loads decide, runs go on as they would have."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fast_compilation import compile_fast  # noqa: F401
from sharding.meshes import mesh_layout
from training import tiny
from training.steps import drawn_state, fresh, make_batch

from moe_jax.errors import UserError
from moe_jax.moe.placement_balance import device_loads, imbalance
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.placed import place_batch
from moe_jax.training.placement_balance import make_balancer
from moe_jax.training.state import PlacementState, abstract_state, state_shardings
from moe_jax.training.step import make_train_step

E, EVERY = 8, 3
IDENTITY = np.tile(np.arange(E), (2, 1))
# Both hot experts of the first layer share a device; the second layer is balanced.
LOAD = np.array([[9.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0], [3.0] * E])


@functools.cache
def experiment(**fields):
  return tiny.experiment(
    **{
      "model__segments": (("attention:moe", 2),),
      "moe__num_experts": E,
      "balance_placement__every": EVERY,
      "balance_placement__devices": 4,
    }
    | fields
  )


@functools.cache
def before():
  """Returns the state of a run that has counted `LOAD`."""
  config = experiment()
  state = abstract_state(config.model, optax.identity(), balance=config.balance_placement)
  state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
  placement = PlacementState(jnp.asarray(LOAD, jnp.float32), jnp.asarray(IDENTITY, jnp.int32))
  return dataclasses.replace(state, placement=placement)


def balanced(step: int):
  return make_balancer(experiment(), optax.identity())(fresh(before()), step)


def test_devices_carry_equal_loads_after_a_move():
  after = balanced(EVERY)
  born = np.asarray(after.placement.born)
  reached = imbalance(device_loads(LOAD, born, 4))
  # A device with a hot expert carries 10 of 24; no placement does better than 9 + 1.
  np.testing.assert_allclose(reached, [10 / 6, 1.0])
  np.testing.assert_array_equal(born[1], IDENTITY[1])
  assert not np.any(after.placement.load)


@pytest.mark.parametrize("step", [EVERY + 1, experiment().steps])
def test_nothing_moves_between_the_steps_and_at_the_end(step):
  for new, old in zip(jax.tree.leaves(balanced(step)), jax.tree.leaves(before()), strict=True):
    np.testing.assert_array_equal(new, old)


def test_the_number_of_devices_is_that_of_the_layout():
  config, layout = experiment(), mesh_layout("ep")
  make_balancer(config, optax.identity(), layout)
  wrong = experiment(balance_placement__devices=8)
  with pytest.raises(UserError, match="devices = 8 is refused: the layout splits .* 4 parts"):
    make_balancer(wrong, optax.identity(), layout)


@pytest.mark.parametrize(
  "variant, fields, match",
  [
    ("dense", {}, "every = 3 is refused: it must be 0 for a model without experts"),
    ("moe", dict(balance_placement__devices=0), "devices = 0 is refused: the layout does not"),
    ("moe", dict(balance_placement__devices=3), "8 experts .* 3 devices cannot share evenly"),
    ("moe", dict(balance_placement__spare=4), "spare = 4 is refused with dispatch = gather"),
    (
      "moe",
      dict(balance_placement__spare=6, moe__dispatch="ragged"),
      "6 spare slots .* 4 devices .* nearest is 8",
    ),
    ("moe", dict(balance_placement__min_gain=1.0), "min_gain = 1.0 is refused"),
    ("moe", dict(balance_placement__nodes=3), "nodes = 3 is refused"),
    ("moe", dict(moe__selection="hash"), "selection = hash"),
  ],
)
def test_balancing_that_cannot_be_is_refused(variant, fields, match):
  fixed = {"moe__num_experts": E} if variant == "moe" else {}
  fixed |= {"balance_placement__every": EVERY, "balance_placement__devices": 4}
  with pytest.raises(UserError, match=match):
    tiny.experiment(variant, **fixed | fields)


def run_of(config, layout=None, steps: int = 3):
  """Returns what each step measures, and where experts are before and after all."""
  optimizer = make_optimizer(config.optimizer, config.steps)
  state = drawn_state(config, optimizer)
  born = None if state.placement is None else np.asarray(state.placement.born)
  if layout is not None:
    state = jax.device_put(state, state_shardings(state, layout))
  step, balance = (
    make_train_step(config, optimizer, layout),
    make_balancer(config, optimizer, layout),
  )
  seen = []
  for number in range(1, steps + 1):
    batch = make_batch(number, rows=8)
    state, metrics = step(state, batch if layout is None else place_batch(batch, layout))
    state = balance(state, number)
    seen.append([float(metrics[name]) for name in ("loss", "grad_norm", "moe/max_violation")])
  return np.array(seen), born, state.placement


def test_a_run_on_a_mesh_with_moves_and_copies_is_the_run_without():
  fields = dict(
    batch_size=8,
    model__vocab_size=264,
    moe__top_k=2,
    moe__weighting="renormalized",
    moe__overflow="dropless",
    moe__dispatch="ragged",
    # Its statistics move along and are split over the mesh too.
    optimizer__name="adafactor",
    balance_placement__every=1,
  )
  layout = mesh_layout("ep")
  alone, *_ = run_of(experiment(**fields | {"balance_placement__every": 0}))
  seen, born, placement = run_of(experiment(balance_placement__spare=8, **fields), layout)
  # Loads after the first step are known, so two balancings lie between these three steps.
  assert np.any(np.asarray(placement.born) != born)
  assert len(np.unique(placement.copied)) > 1
  # A softmax and a token's sums over experts change their order, three steps amplify it.
  np.testing.assert_allclose(seen, alone, rtol=1e-5)
