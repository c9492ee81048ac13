"""All routing measures of a run's checkpoints, for its card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.analysis.routing_measures import Measure
from moe_jax.analysis.routing_recorder import RoutingRecorder, measure_checkpoints
from moe_jax.data.builders import PreparedData
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.saved_run import load_run
from moe_jax.training.state import model_graph
from moe_jax.training.step_folders import FOLDER, saved_steps

_BATCHES = 32


def routing_history(
  config: ExperimentConfig, folder: Path, texts: Mapping[str, PreparedData]
) -> dict[str, Any]:
  """Returns what `moe-jax analyze` measures, of at most 32 batches of each text.

  Args:
    config: of the run.
    folder: of the run; every checkpoint in it is routed.
    texts: held-out texts by the name of their domain.

  Returns:
    Nested by the measure's name; `step_N` where it compares checkpoints; `layer_N`, `mean` and
    `max` over layers, and `floor`, what a router that ignores its input would show on average.
  """
  graph = model_graph(config.model.dropless())
  recorder = RoutingRecorder(graph, texts, config.batch_size, _BATCHES)
  models = [load_run(folder, step)[1:] for step in saved_steps(folder / FOLDER)]
  traces = [recorder.trace(model, step, folder.name) for step, model in models]
  return by_name(measure_checkpoints(config.model, recorder, traces, models[-1][1]))


def by_name(measures: Sequence[Measure]) -> dict[str, Any]:
  """Returns measures as the card has them, see `routing_history`."""
  found: dict[str, Any] = {}
  for name in dict.fromkeys(measure.name for measure in measures):
    steps: dict[int | None, list[Measure]] = {}
    for measure in measures:
      if measure.name == name:
        steps.setdefault(measure.step, []).append(measure)
    if None in steps:
      found[name] = _of_layers(steps[None])
    else:
      found[name] = {f"step_{step}": _of_layers(own) for step, own in steps.items()}
  return found


def _of_layers(measures: Sequence[Measure]) -> dict[str, float]:
  layers = {f"layer_{m.layer}": m.value for m in measures if m.layer is not None}
  floors = [measure.floor for measure in measures if measure.floor is not None]
  floor = {"floor": float(np.mean(floors))} if floors else {}
  values = [measure.value for measure in measures]
  return layers | floor | {"mean": float(np.mean(values)), "max": float(np.max(values))}
