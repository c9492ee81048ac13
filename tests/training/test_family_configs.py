"""The tiny variant of every family trains, is saved and restored, and generates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from flax import nnx
from moe.compiled import FAST_COMPILE
from training import tiny
from training.steps import make_batch

from moe_jax.cli import main
from moe_jax.config.load import load_config
from moe_jax.inference.generate import generate
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.config import CheckpointConfig, ExperimentConfig, experiment_from
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import TrainState, abstract_state, model_graph
from moe_jax.training.step import make_train_step

FAMILIES = sorted(
  path.stem
  for path in (tiny.ROOT / "configs").glob("*.py")
  if f"{path.name}:tiny" in path.read_text()
)


def experiment_of(family: str) -> ExperimentConfig:
  config = load_config(f"{tiny.ROOT}/configs/{family}.py:tiny")
  config.batch_size, config.data.sequence_length = 4, 32
  return experiment_from(config.to_dict())


def drawn_state(template: TrainState) -> TrainState:
  """Random parameters in the shapes of a state: initialisation would take longer to compile."""
  rng = np.random.default_rng(0)

  def draw(param):
    shape, axes = param.get_value().shape, param.get_metadata()["axes"]
    scale = 0.0 if "bias" in axes else 0.1
    value = np.ones(shape) if axes[-1] == "norm" else scale * rng.normal(size=shape)
    return param.replace(jnp.asarray(value, jnp.float32))

  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template)
  params = jax.tree.map(draw, template.params, is_leaf=lambda n: isinstance(n, nnx.Variable))
  return TrainState(zeros.step, params, zeros.router_state, zeros.opt_state, zeros.repair)


def batch_of(config: ExperimentConfig) -> dict[str, np.ndarray]:
  """A batch of random tokens, as pairs where the model has an encoder."""
  batch = jax.device_get(make_batch())
  if config.pair_maker is None:
    return batch
  rng = np.random.default_rng(0)
  rows = [{name: values[i] for name, values in batch.items()} for i in range(4)]
  pairs = [config.pair_maker(row, rng) for row in rows]
  return {name: np.stack([pair[name] for pair in pairs]) for name in pairs[0]}


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_trains_saves_restores_and_generates(family, tmp_path):
  config = experiment_of(family)
  optimizer = make_optimizer(config.optimizer, config.steps)
  template = abstract_state(config.model, optimizer)
  state, batch = drawn_state(template), batch_of(config)
  step = make_train_step(config, optimizer).lower(state, batch).compile(FAST_COMPILE)
  losses = []
  for _ in range(20):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  # The same random tokens again and again, from the logarithm of 259 on; Granite, whose logits are
  # divided by 6, learns the least: 0.3.
  assert losses[-1] < losses[0] - 0.2

  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    checkpoints.save(20, state, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(20, template)
  jax.tree.map(np.testing.assert_array_equal, restored, state)

  model = nnx.merge(model_graph(config.model.dropless()), restored.model)
  prompt = batch["tokens"][:2, :5]
  # An encoder-decoder answers, from its start token on.
  kept = prompt if config.pair_maker is None else np.full((2, 1), config.model.encoder.start_token)
  tokens = generate(model, prompt, 4)
  assert tokens.shape == (2, kept.shape[1] + 4)
  np.testing.assert_array_equal(tokens[:, : kept.shape[1]], kept)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_runs_from_the_command_line(family, tmp_path, capsys):
  run = f"--workdir={tmp_path / 'run'}"
  config = f"--config={tiny.ROOT}/configs/{family}.py"
  assert main(["train", config, run, "--config.steps=20", "--config.eval.batch_size=512"]) == 0
  assert "held-out bits per byte" in capsys.readouterr().out
  assert main(["generate", run, "--prompt=We", "--max_new_tokens=4"]) == 0
  assert capsys.readouterr().out.startswith("We")
