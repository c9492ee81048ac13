"""Repair of cold experts: they serve again, nothing else moves, and a run across it resumes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from training import tiny
from training.steps import compiled_step, fresh, make_batch

from moe_jax.errors import UserError
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.config import CheckpointConfig
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.repair import cold_experts, repair_cold_experts
from moe_jax.training.state import abstract_state

DEAD, EVERY = 2, 2
LAYER = ("segments", 0, "blocks", 0, "feed_forward")


@functools.cache
def experiment(init: str = "copy", **fields):
  return tiny.experiment(
    **{
      "model__segments": (("attention:moe", 2),),
      "moe__overflow": "dropless",
      "moe__top_k": 2,
      "moe__weighting": "renormalized",
      "moe__bias_update": "sign",
      "moe__adaptive_target": 0.5,
      "moe__router_jitter": 0.1,
      "repair__every": EVERY,
      "repair__init": init,
      "repair__noise": 0.05,
      "repair__threshold": 1.0,
    }
    | fields
  )


def with_dead_expert(state):
  """Returns the state whose first MoE layer scores one expert so low that no token selects it."""
  flat = dict(nnx.to_flat_state(state.params))
  kernel, embedding = (*LAYER, "router", "kernel"), ("embedding",)
  # All tokens share a direction, and the dead expert's column points the other way.
  flat[embedding] = flat[embedding].replace(flat[embedding].get_value() + 5.0)
  flat[kernel] = flat[kernel].replace(flat[kernel].get_value().at[0, :, DEAD].set(-100.0))
  return dataclasses.replace(state, params=nnx.from_flat_state(flat.items()))


# Expert 2 of the first layer is cold, nobody of the second; the hottest is 3.
ONE_COLD = jnp.array([[9.0, 9.0, 0.0, 22.0], [10.0, 10.0, 10.0, 10.0]])
BIAS = jnp.array([[1.0, 2.0, 99.0, 4.0], [1.0, 2.0, 3.0, 4.0]])


@functools.cache
def repair(init: str):
  config = experiment(init, repair__threshold=0.1)
  optimizer = make_optimizer(config.optimizer, config.steps)
  return jax.jit(lambda state: repair_cold_experts(state, optimizer, config))


def before_repair(trained, step: int = EVERY):
  return dataclasses.replace(
    trained,
    step=jnp.int32(step),
    repair=dataclasses.replace(trained.repair, load=ONE_COLD),
    router_state=jax.tree.map(lambda a: BIAS if a.ndim == 2 else a, trained.router_state),
  )


@pytest.fixture(scope="module")
def trained():
  """A state after a step, all moments at work."""
  state, step = compiled_step(experiment())
  return step(fresh(state), make_batch())[0]


def of_experts(tree) -> list[np.ndarray]:
  """Returns the arrays of the MoE stack in a tree like the parameters, experts on axis 1."""
  layer = tree
  for key in LAYER:
    layer = layer[key]
  kernel = layer["router"]["kernel"].get_value()
  weights = [v.get_value() for v in layer["experts"]["weights"].values()]
  return [np.asarray(a) for a in (jnp.swapaxes(kernel, 1, 2), *weights)]


def moments(state):
  (adam,) = [
    part
    for part in jax.tree.leaves(state.opt_state, is_leaf=lambda part: hasattr(part, "mu"))
    if hasattr(part, "mu")
  ]
  return adam.mu, adam.nu


def test_a_dead_expert_gets_tokens_again_after_repair():
  state, step = compiled_step(experiment())
  state = with_dead_expert(fresh(state))
  loads, counts = [], []
  for _ in range(EVERY + 1):
    state, metrics = step(state, make_batch())
    loads.append(float(metrics["moe/layer_0/load"][DEAD]))
    counts.append(int(metrics["moe/repaired_experts"]))
  assert loads[:EVERY] == [0.0] * EVERY
  assert loads[EVERY] > 0.1
  assert counts[0] == 0 < counts[EVERY - 1]


@pytest.mark.parametrize("init", ["copy", "fresh"])
def test_nothing_but_the_cold_expert_moves(trained, init):
  before = before_repair(trained)
  after = repair(init)(before)
  touched = np.zeros((2, 4), bool)
  touched[0, DEAD] = True
  for old, new in zip(of_experts(before.params), of_experts(after.params), strict=True):
    np.testing.assert_array_equal(old[~touched], new[~touched])
    assert (old[touched] != new[touched]).all()
  for old, new in zip(moments(before), moments(after), strict=True):
    for x, y in zip(of_experts(old), of_experts(new), strict=True):
      np.testing.assert_array_equal(x[~touched], y[~touched])
      assert (x[touched] != 0).any() and (y[touched] == 0).all()
  assert int(after.repair.repaired) == 1
  assert not np.any(after.repair.load)


def test_all_other_parameters_and_moments_stay(trained):
  before = before_repair(trained)
  after = repair("copy")(before)
  trees = [(before.params, after.params), *zip(moments(before), moments(after), strict=True)]
  for old, new in trees:
    old, new = dict(nnx.to_flat_state(old)), dict(nnx.to_flat_state(new))
    assert old.keys() == new.keys()
    for path in old:
      if path[: len(LAYER)] != LAYER:
        np.testing.assert_array_equal(old[path].get_value(), new[path].get_value())


@pytest.mark.parametrize("projection", ["affine", "normalized"])
def test_a_bias_of_logits_belongs_to_its_expert_and_a_scale_to_none(projection):
  config = experiment(moe__projection=projection)
  state, _ = compiled_step(config)
  name = {"affine": "logit_bias", "normalized": "logit_scale"}[projection]
  path, flat = (*LAYER, "router", name), dict(nnx.to_flat_state(state.params))
  old = 1.0 + np.arange(flat[path].get_value().size, dtype=np.float32)
  old = old.reshape(flat[path].get_value().shape)
  flat[path] = flat[path].replace(jnp.asarray(old))
  before = before_repair(dataclasses.replace(state, params=nnx.from_flat_state(flat.items())))
  optimizer = make_optimizer(config.optimizer, config.steps)
  after = jax.jit(lambda state: repair_cold_experts(state, optimizer, config))(before)
  new = np.asarray(dict(nnx.to_flat_state(after.params))[path].get_value())
  if projection == "affine":
    # The hottest expert's bias is 4; the noise has a standard deviation of 0.2.
    assert new[0, DEAD] != old[0, DEAD] and abs(new[0, DEAD] - 4.0) < 1.0
    new[0, DEAD] = old[0, DEAD]
  np.testing.assert_array_equal(new, old)


def test_a_copy_is_the_hottest_expert_and_noise(trained):
  for new in of_experts(repair("copy")(before_repair(trained)).params):
    difference = new[0, DEAD] - new[0, 3]
    size = np.sqrt(np.mean(new[0, 3] ** 2))
    # The deviation of 16 or more draws is within a factor of two.
    assert 0.5 < np.std(difference) / (0.05 * size) < 2


def test_a_fresh_expert_is_drawn_as_at_birth(trained):
  born = of_experts(compiled_step(experiment())[0].params)
  after = of_experts(repair("fresh")(before_repair(trained)).params)
  for new, old in zip(after, born, strict=True):
    assert 0.5 < np.std(new[0, DEAD]) / np.std(old[0]) < 2
    assert (new[0, DEAD] != old[0, DEAD]).all()


@pytest.mark.parametrize("init, expected", [("copy", 4.0), ("fresh", 7.0 / 3)])
def test_a_repaired_expert_competes_on_equal_terms(trained, init, expected):
  state = repair(init)(before_repair(trained)).router_state
  (new,) = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
  np.testing.assert_allclose(new, BIAS.at[0, DEAD].set(expected), rtol=1e-6)


def test_what_is_drawn_depends_on_the_step(trained):
  first, again, later = (
    of_experts(repair("copy")(before_repair(trained, step)).params)[1][0, DEAD]
    for step in (EVERY, EVERY, 2 * EVERY)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != later).all()


@pytest.mark.parametrize("step", [EVERY + 1, experiment().steps])
def test_nothing_is_repaired_between_the_steps_and_at_the_end(trained, step):
  before = before_repair(trained, step)
  after = repair("copy")(before)
  for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(x, y)


def test_cold_is_below_a_share_of_the_mean_load():
  loads = jnp.array([[10.0, 10.0, 1.0, 19.0], [0.0, 0.0, 0.0, 0.0]])
  # The mean is 10: an expert at the threshold is not below it; without a token nobody is.
  assert not cold_experts(loads, 0.1).any()
  assert cold_experts(loads, 0.11).tolist() == [[False, False, True, False], [False] * 4]


def test_resuming_across_repairs_is_exact(tmp_path):
  config = experiment()
  start, step = compiled_step(config)
  batches = [make_batch(seed) for seed in range(5)]
  state = fresh(start)
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    for number, batch in enumerate(batches, start=1):
      state, metrics = step(state, batch)
      if number == 3:
        # In the middle of a window, after the first repair.
        assert np.any(state.repair.load)
        checkpoints.save(number, state, {})
        checkpoints.wait()
    template = abstract_state(
      config.model, make_optimizer(config.optimizer, config.steps), config.repair
    )
    resumed, _ = checkpoints.restore(3, template)
  for batch in batches[3:]:
    resumed, resumed_metrics = step(resumed, batch)
  assert int(resumed.repair.repaired) > 0
  assert jax.tree.structure(resumed) == jax.tree.structure(state)
  for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(x, y)
  for name, value in metrics.items():
    np.testing.assert_array_equal(value, resumed_metrics[name])


@pytest.mark.parametrize(
  "variant, fields, match",
  [
    ("dense", {}, "repair.every = 5 is refused: it must be 0 for a model without experts"),
    ("moe", dict(moe__selection="hash"), "must be 0 with selection = hash"),
    ("moe", dict(repair__threshold=1.5), "threshold = 1.5 is refused"),
    ("moe", dict(repair__init="copi"), "copi.*copy"),
  ],
)
def test_repair_that_cannot_help_is_refused(variant, fields, match):
  with pytest.raises(UserError, match=match):
    tiny.experiment(variant, repair__every=5, **fields)
