"""A training step of a model with depth blocks says what they did."""

import dataclasses

import jax
import jax.numpy as jnp
from training.tiny import experiment

from moe_jax.data.packing import FIELDS
from moe_jax.models import DepthConfig
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import abstract_state
from moe_jax.training.step import make_train_step


def test_a_step_logs_every_depth_block():
  config = experiment("dense", accumulation_steps=2)
  segments = (("attention:dense attention:dense:depth", 2),)
  model = dataclasses.replace(config.model, segments=segments, depth=DepthConfig())
  config = dataclasses.replace(config, model=model)
  optimizer = make_optimizer(config.optimizer, config.steps)
  batch = dict.fromkeys(FIELDS, jax.ShapeDtypeStruct((4, 32), jnp.int32))
  state = abstract_state(config.model, optimizer)
  _, metrics = jax.eval_shape(make_train_step(config, optimizer), state, batch)
  logged = {name for name in metrics if name.startswith("depth/")}
  names = ("loss", "taken_fraction", "agreement")
  assert logged == {f"depth/layer_{layer}/{name}" for layer in (1, 3) for name in names}
