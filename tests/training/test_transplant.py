"""A run's state after surgery: moments, counts and steps are carried or reset as asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fast_compilation import compile_fast  # noqa: F401
from surgery_cases import leaves_of
from training import tiny

from moe_jax.convert.surgery import (
  UpcycleOptions,
  expert_operation,
  resized_config,
  upcycled_config,
  upcycling,
  without,
)
from moe_jax.errors import UserError
from moe_jax.moe import preset
from moe_jax.training.config import RepairConfig
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import abstract_state
from moe_jax.training.transplant import Moments, Schedule, transplant

KEY = jax.random.key(0)
SOURCE = tiny.experiment("dense", model__segments=(("attention:dense", 1),))
STEP = 4


def drawn_state(config):
  """Returns a state whose every array is drawn, at step 4 of its run."""
  optimizer = make_optimizer(config.optimizer, config.steps)
  rng = np.random.default_rng(0)

  def draw(a):
    whole = jnp.issubdtype(a.dtype, jnp.integer)
    return jnp.asarray(STEP if whole else rng.uniform(1, 2, a.shape), a.dtype)

  return jax.tree.map(draw, abstract_state(config.model, optimizer, config.repair))


def upcycled(**how):
  """Returns the dense state and the upcycled one."""
  options, state = UpcycleOptions(), drawn_state(SOURCE)
  routing = preset("mixtral", num_experts=4, bias_update="sign")
  model = upcycled_config(SOURCE.model, routing, (0,), options)
  operation = upcycling(SOURCE.model, model, options, KEY)
  return state, transplant(state, operation, dataclasses.replace(SOURCE, model=model), **how)


def parts(state):
  """Returns Adam's and the schedule's part of the optimiser's state."""
  leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda a: isinstance(a, optax.ScaleByAdamState))
  (adam,) = [leaf for leaf in leaves if isinstance(leaf, optax.ScaleByAdamState)]
  kind = optax.ScaleByScheduleState
  leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda a: isinstance(a, kind))
  (schedule,) = [leaf for leaf in leaves if isinstance(leaf, kind)]
  return adam, schedule


def test_carried_moments_are_those_of_the_dense_network_in_every_expert():
  old, new = upcycled()
  (before, _), (after, schedule) = parts(old), parts(new)
  ff = ("segments", 0, "blocks", 0, "feed_forward")
  for moment in ("mu", "nu"):
    source, target = leaves_of(getattr(before, moment)), leaves_of(getattr(after, moment))
    assert target.keys() == leaves_of(new.params).keys()
    for name in ("up", "down"):
      for expert in range(4):
        np.testing.assert_array_equal(
          target[*ff, "experts", "weights", name][0, expert], source[*ff, "weights", name][0]
        )
    assert not target[*ff, "router", "kernel"].any()
    np.testing.assert_array_equal(target["embedding",], source["embedding",])
  assert (after.count, schedule.count, new.step) == (STEP, STEP, STEP)
  assert not leaves_of(new.router_state)[*ff, "router", "bias"].any()


def test_the_state_is_one_that_a_checkpoint_of_the_target_restores_into():
  _, new = upcycled()
  model = dataclasses.replace(
    SOURCE,
    model=upcycled_config(
      SOURCE.model,
      preset("mixtral", num_experts=4, bias_update="sign"),
      (0,),
      UpcycleOptions(),
    ),
  )
  template = abstract_state(model.model, make_optimizer(model.optimizer, model.steps))
  assert jax.tree.structure(new) == jax.tree.structure(template)
  for have, need in zip(jax.tree.leaves(new), jax.tree.leaves(template), strict=True):
    assert (have.shape, have.dtype) == (need.shape, need.dtype)


COUNTS = {
  (Moments.RESET, Schedule.KEEP): (0, STEP),
  (Moments.CARRY, Schedule.RESET): (STEP, 0),
  (Moments.RESET, Schedule.RESET): (0, 0),
}


@pytest.mark.parametrize("how", COUNTS, ids=lambda how: " ".join(how))
def test_moments_and_schedule_are_reset_apart(how):
  _, new = upcycled(moments=how[0], schedule=how[1])
  adam, schedule = parts(new)
  assert (int(adam.count), int(schedule.count)) == COUNTS[how]
  assert int(new.step) == COUNTS[how][1]
  drawn = any(np.any(a) for a in leaves_of(adam.mu).values())
  assert drawn == (how[0] == Moments.CARRY)


def test_pruning_keeps_moments_and_starts_the_window_of_repair_anew():
  config = tiny.experiment(model__segments=(("attention:moe", 1),), model__mlp=None)
  config = dataclasses.replace(config, repair=RepairConfig(every=2))
  state, model = drawn_state(config), resized_config(config.model, 3)
  operation = expert_operation(config.model, model, [without(4, [1])], KEY)
  new = transplant(state, operation, dataclasses.replace(config, model=model))
  path = ("segments", 0, "blocks", 0, "feed_forward", "experts", "weights", "up")
  for have, source in zip(parts(new)[0][1:], parts(state)[0][1:], strict=True):
    np.testing.assert_array_equal(leaves_of(have)[path][0], leaves_of(source)[path][0][[0, 2, 3]])
  assert new.repair.load.shape == (1, 3) and not new.repair.load.any()


def test_moments_that_are_not_adams_are_not_carried():
  source = tiny.experiment(
    "dense", model__segments=(("attention:dense", 1),), optimizer__name="adafactor"
  )
  options, state = UpcycleOptions(), drawn_state(source)
  model = upcycled_config(source.model, preset("mixtral", num_experts=4), (0,), options)
  operation = upcycling(source.model, model, options, KEY)
  with pytest.raises(UserError, match="moments = carry is refused .* use moments = reset"):
    transplant(state, operation, dataclasses.replace(source, model=model))
