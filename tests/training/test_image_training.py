"""A tiny Llama 4 learns from a batch with images, its tower too, and answers what it is shown."""

import jax
import jax.numpy as jnp
import numpy as np
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from training import tiny
from training.test_family_configs import drawn_state

from moe_jax.config.load import load_config
from moe_jax.inference import generate
from moe_jax.training.config import experiment_from
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import abstract_state, model_graph
from moe_jax.training.step import make_train_step

ROWS, LENGTH = 2, 12


def batch_of(vision) -> dict[str, np.ndarray]:
  """Every row tells its image: the tokens behind the image are the row's own."""
  rng = np.random.default_rng(0)
  tokens = np.full((ROWS, LENGTH + 1), 10, np.int32)
  tokens[:, 1 : 1 + vision.tokens_per_image] = vision.image_token
  tokens[:, 1 + vision.tokens_per_image :] = np.array([[70], [90]])
  ones = np.ones((ROWS, LENGTH), np.int32)
  return {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segment_ids": ones,
    "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    "loss_mask": (tokens[:, 1:] != vision.image_token).astype(np.int32),
    "pixel_values": rng.standard_normal((ROWS, *vision.image_shape)).astype(np.float32),
  }


def test_a_tiny_llama4_learns_to_answer_what_an_image_shows():
  config = load_config(f"{tiny.ROOT}/configs/llama4.py:tiny_vision")
  config.batch_size, config.data.sequence_length = ROWS, LENGTH
  # Half the blocks, one of each kind, take half the time to compile.
  config.model.segments = (("attention:dense global_attention:moe", 1),)
  config.steps, config.optimizer.warmup_steps = 30, 2
  config.optimizer.learning_rate = 1e-2
  experiment = experiment_from(config.to_dict())
  optimizer = make_optimizer(experiment.optimizer, experiment.steps)
  state = drawn_state(abstract_state(experiment.model, optimizer))
  before = jax.device_get(nnx.to_flat_state(state.params))
  step, batch = make_train_step(experiment, optimizer), batch_of(experiment.model.vision)
  for _ in range(experiment.steps):
    state, metrics = step(state, batch)
  assert np.isfinite(metrics["loss"])
  for (path, old), (_, new) in zip(before, nnx.to_flat_state(state.params), strict=True):
    if path[0] == "vision":
      assert np.abs(new.get_value() - old.get_value()).max() > 0, path

  model = nnx.merge(model_graph(experiment.model.dropless()), state.model)
  images = jnp.asarray(batch["pixel_values"])
  prompt = jnp.asarray(batch["tokens"][:, : 1 + experiment.model.vision.tokens_per_image])
  for order, answers in (([0, 1], [70, 90]), ([1, 0], [90, 70])):
    said = generate(model, prompt, 2, pixel_values=images[jnp.array(order)])
    np.testing.assert_array_equal(said[:, -2:], np.array(answers)[:, None].repeat(2, axis=1))
