"""Writers to experiment trackers: Weights & Biases, and trackio, which has the same functions."""

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError


class TrackerWriter:
  """Writes the scalars of each row to a project of a tracker.

  A run that is started again goes on in the same run of the project: its name there is made of its
  folder. Steps that are trained again come out the same, so trackers may drop or replace them.
  """

  def __init__(self, package: str, project: str, workdir: Path):
    """Begins or resumes a run of a project.

    Args:
      package: `wandb` or `trackio`.
      project: its name.
      workdir: the run folder.
    """
    self._tracker = importlib.import_module(package)
    place = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:8]
    name = f"{workdir.name}-{place}"
    more = {"id": name, "dir": str(workdir)} if package == "wandb" else {}
    self._tracker.init(project=project, name=name, resume="allow", **more)

  def write(self, row: dict[str, Any]) -> None:
    """Writes every scalar of a row."""
    scalars = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
    self._tracker.log(scalars, step=row["step"])

  def sync(self) -> None:
    """Does nothing: trackers send by themselves."""

  def close(self) -> None:
    """Ends the run of the project, which sends the rest."""
    self._tracker.finish()


def check_tracker(package: str, project: str) -> None:
  """Raises UserError if a tracker that the config asks for is not installed."""
  if project and importlib.util.find_spec(package) is None:
    raise UserError(
      f"config.log.{package} = {project!r} needs the package {package}; pip install {package}, or"
      " leave the field empty"
    )
