"""Reading a run back: its config and parameters."""

from pathlib import Path

from flax import nnx

from moe_jax.training.checkpoint import restore_params
from moe_jax.training.config import ExperimentConfig, experiment_from
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.run_folder import read_config
from moe_jax.training.state import abstract_state


def load_run(workdir: Path, step: int | None = None) -> tuple[ExperimentConfig, int, nnx.State]:
  """Returns (config, step, parameters) of a run folder, the latest checkpoint if step is None.

  Raises:
    UserError: the folder is no run's, or has no such checkpoint.
  """
  config = experiment_from(read_config(workdir))
  optimizer = make_optimizer(config.optimizer, config.steps)
  step, params = restore_params(workdir, abstract_state(config.model, optimizer), step)
  return config, step, params
