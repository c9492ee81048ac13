"""Reading a run back: its config and the variables of its model."""

from pathlib import Path
from typing import Any

from flax import nnx

from moe_jax.config import import_modules
from moe_jax.errors import UserError
from moe_jax.training.checkpoint import restore_model, restore_whole
from moe_jax.training.config import ExperimentConfig, experiment_from
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.run_folder import CONFIG_FILE, read_config
from moe_jax.training.state import TrainState, abstract_state


def load_run(workdir: Path, step: int | None = None) -> tuple[ExperimentConfig, int, nnx.State]:
  """Returns (config, step, model variables) of a run, the latest checkpoint if step is None.

  With `model_graph(config.model)` the variables, parameters and router state, make a model.

  Raises:
    UserError: the folder is no run's, has no such checkpoint, or is damaged, or a module of its
      `imports` cannot be imported.
  """
  config = load_experiment(workdir)
  step, model = restore_model(workdir, _template(config), step)
  return config, step, model


def load_state(
  workdir: Path, step: int | None = None
) -> tuple[ExperimentConfig, TrainState, dict[str, Any]]:
  """Returns (config, state, place in the data) of a run: all that its training goes on from.

  Raises:
    UserError: see `load_run`.
  """
  config = load_experiment(workdir)
  return config, *restore_whole(workdir, _template(config), step)


def load_experiment(workdir: Path) -> ExperimentConfig:
  """Returns the config of a run.

  Raises:
    UserError: see `load_run`.
  """
  mapping = read_config(workdir)
  try:
    import_modules(mapping)
  except UserError as error:
    raise UserError(f"{workdir / CONFIG_FILE}: {error}") from error
  try:
    return experiment_from(mapping)
  except UserError as error:
    raise UserError(
      f"{workdir / CONFIG_FILE} is damaged or of another version of moe_jax: {error}"
    ) from error


def _template(config: ExperimentConfig) -> TrainState:
  optimizer = make_optimizer(config.optimizer, config.steps)
  return abstract_state(config.model, optimizer, config.repair, balance=config.balance_placement)
