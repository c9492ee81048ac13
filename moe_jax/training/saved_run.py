"""Reading a run back: its config and the variables of its model."""

from pathlib import Path

from flax import nnx

from moe_jax.config import import_modules
from moe_jax.errors import UserError
from moe_jax.training.checkpoint import restore_model
from moe_jax.training.config import ExperimentConfig, experiment_from
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.run_folder import CONFIG_FILE, read_config
from moe_jax.training.state import abstract_state


def load_run(workdir: Path, step: int | None = None) -> tuple[ExperimentConfig, int, nnx.State]:
  """Returns (config, step, model variables) of a run, the latest checkpoint if step is None.

  With `model_graph(config.model)` the variables, parameters and router state, make a model.

  Raises:
    UserError: the folder is no run's, has no such checkpoint, or is damaged, or a module of its
      `imports` cannot be imported.
  """
  mapping = read_config(workdir)
  try:
    import_modules(mapping)
  except UserError as error:
    raise UserError(f"{workdir / CONFIG_FILE}: {error}") from error
  try:
    config = experiment_from(mapping)
  except UserError as error:
    raise UserError(
      f"{workdir / CONFIG_FILE} is damaged or of another version of moe_jax: {error}"
    ) from error
  optimizer = make_optimizer(config.optimizer, config.steps)
  template = abstract_state(config.model, optimizer, config.repair)
  step, model = restore_model(workdir, template, step)
  return config, step, model
