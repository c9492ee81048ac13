"""Training steps on eight devices against the same steps on one."""

import functools

import jax
import numpy as np
import optax
import pytest
from fast_compilation import compile_fast  # noqa: F401
from sharding.layer_on_a_mesh import assert_close
from sharding.meshes import MESHES, mesh_layout
from training.steps import make_batch
from training.tiny import experiment

from moe_jax.training.placed import place_batch
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step

STEPS = 3


def _experiment(dispatch):
  return experiment(
    batch_size=16,
    accumulation_steps=2,
    model__vocab_size=264,
    model__num_kv_heads=2,
    moe__num_experts=8,
    moe__dispatch=dispatch,
    moe__grouping="fixed",
    moe__group_size=16,
    moe__bias_update="sign",
  )


def _run(config, layout):
  # Keeps the gradients themselves, and moves little enough for steps to stay comparable.
  optimizer = optax.chain(optax.trace(decay=0.0), optax.scale(-1e-2))
  state = init_state(config.model, optimizer, config.seed, layout=layout)
  step = make_train_step(config, optimizer, layout)
  seen = []
  for seed in range(STEPS):
    batch = make_batch(seed, rows=16)
    state, metrics = step(state, batch if layout is None else place_batch(batch, layout))
    seen.append((jax.device_get(state.opt_state[0].trace), jax.device_get(metrics)))
  return seen, jax.device_get(state.router_state)


@functools.cache
def _alone(dispatch):
  return _run(_experiment(dispatch), None)


def _counts(metrics):
  """Returns the names of metrics that are ratios of whole numbers."""
  return [name for name in metrics if "dropped" in name or "assignments" in name]


@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_and_metrics_are_those_of_one_device(mesh):
  dispatch = "gather"
  (got, state), (want, own) = _run(_experiment(dispatch), mesh_layout(mesh)), _alone(dispatch)
  assert len(jax.tree.leaves(own)) == 1
  jax.tree.map(np.testing.assert_array_equal, state, own)
  for step in range(STEPS):
    assert_close(got[step], want[step])
    for name in _counts(want[step][1]):
      assert got[step][1][name] == want[step][1][name], (step, name)
