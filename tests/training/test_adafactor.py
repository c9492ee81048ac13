"""Adafactor: optax's numbers for every matrix, however stacked, at the memory that is stated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.layers.parameters import with_axes
from moe_jax.training.adafactor import scale_by_adafactor
from moe_jax.training.config import OptimizerConfig
from moe_jax.training.expert_arrays import along, map_optimizer
from moe_jax.training.optimizer import make_optimizer

SHAPES = {
  # Larger in both stacks than in its width: optax by itself would sum over layers and experts.
  "stacked": ((2, 2, 130, 140), ("layers", "expert", "embed", "expert_mlp")),
  "matrix": ((150, 130), ("vocab", "embed")),
  "narrow": ((2, 200, 8), ("layers", "embed", "router")),
  "scale": ((2, 16), ("layers", "norm")),
}


def draw(seed: int) -> nnx.State:
  rng = np.random.default_rng(seed)
  values = {
    name: rng.standard_normal(shape).astype(np.float32) for name, (shape, _) in SHAPES.items()
  }
  return nnx.State({name: with_axes(jnp.asarray(values[name]), SHAPES[name][1]) for name in SHAPES})


def test_every_matrix_moves_as_in_optax():
  params, ours = draw(0), scale_by_adafactor()
  state, run = ours.init(params), jax.jit(ours.update)
  alone = optax.adafactor(learning_rate=1.0)
  step = jax.jit(alone.update)
  stacks = {"stacked": 2, "matrix": 0, "narrow": 1, "scale": 1}
  kept = {
    name: {i: alone.init(params[name][...][i]) for i in np.ndindex(SHAPES[name][0][:n])}
    for name, n in stacks.items()
  }
  for seed in (1, 2):
    grads = draw(seed)
    updates, state = run(grads, state, params)
    for name, own in kept.items():
      for i in own:
        param = params[name][...][i]
        expected, own[i] = step(grads[name][...][i], own[i], param)
        # optax's own descends; the order of float32 sums differs under vmap.
        np.testing.assert_allclose(updates[name][...][i], -expected, rtol=1e-5, atol=1e-7)


def test_statistics_name_their_axes():
  state = scale_by_adafactor().init(draw(0))
  for name, (shape, axes) in SHAPES.items():
    sizes = dict(zip(axes, shape, strict=True))
    for part in (state.v_row, state.v_col, state.v):
      own = part[name]
      assert own[...].shape == tuple(sizes[axis] for axis in own.get_metadata()["axes"])
  assert state.v_row["stacked"].get_metadata()["axes"] == ("layers", "expert", "embed")
  assert state.v_col["stacked"].get_metadata()["axes"] == ("layers", "expert", "expert_mlp")
  assert state.v["narrow"].get_metadata()["axes"] == ("layers", "embed", "router")


def test_statistics_of_one_expert_are_found_in_all_that_is_kept():
  params, ours = draw(0), scale_by_adafactor()
  state = jax.tree.map(jnp.ones_like, ours.init(params))
  marked = nnx.State({name: params[name].replace(jnp.bool_(False)) for name in SHAPES})
  marked["stacked"] = params["stacked"].replace(jnp.zeros((2, 2, 1, 1), bool).at[1, 0].set(True))

  def zero(kept, mask):
    return kept.replace(jnp.where(along(mask, kept), 0.0, kept.get_value()))

  state = map_optimizer(ours, zero, state, marked)
  for part, others in ((state.v_row, 130), (state.v_col, 140)):
    assert not np.any(part["stacked"][...][1, 0])
    assert np.sum(part["stacked"][...]) == 3 * others
  assert np.all(state.v["matrix"][...]) and np.all(state.v["narrow"][...])


def test_decay_schedule_and_clipping_are_those_of_adamw():
  params, zero = draw(0), jax.tree.map(jnp.zeros_like, draw(0))
  config = OptimizerConfig(name="adafactor", learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
  optimizer = make_optimizer(config, 10)
  updates, _ = jax.jit(lambda p: optimizer.update(zero, optimizer.init(p), p))(params)
  for name in SHAPES:
    factor = 0.0 if name == "scale" else -0.5 * 0.1
    np.testing.assert_allclose(updates[name][...], factor * params[name][...], rtol=1e-6)


@pytest.mark.parametrize(
  "fields, match",
  [
    (dict(name="adamwww"), "adamwww.*did you mean 'adamw'"),
    (dict(name="adafactor", b2=0.99), "b2 = 0.99 is refused with name = adafactor"),
  ],
)
def test_an_optimizer_that_cannot_be_is_refused(fields, match):
  with pytest.raises(UserError, match=match):
    OptimizerConfig(**fields)
