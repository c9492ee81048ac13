"""What is measured of a trained model, for its card."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax.analysis.counterfactual import counterfactual, part_of
from moe_jax.data.builders import PreparedData, prepare
from moe_jax.data.config import DataConfig
from moe_jax.data.loader import eval_batches
from moe_jax.models.run_batch import run_batch
from moe_jax.moe.metrics import load_statistics
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.evaluate import Evaluator
from moe_jax.training.run_folder import METRICS_FILE
from moe_jax.training.state import model_graph

# Steps at the end whose metrics are averaged: one batch of a small model says little.
_LAST_STEPS = 100
_NO_TRAINING_METRICS = ("step", "tokens", "eval_")


def curves(folder: Path) -> dict[str, Any]:
  """Returns what the rows of a run say.

  Returns:
    `curve`: [step, held-out loss] of every evaluation; `train`: the mean of every scalar metric
    over the last 100 steps, as far as they were logged, and `per_layer` those of single layers.
  """
  rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
  last = [row for row in rows if row["step"] > rows[-1]["step"] - _LAST_STEPS]
  means = {
    name.removeprefix("moe/"): mean
    for name, value in last[-1].items()
    if isinstance(value, int | float) and not name.startswith(_NO_TRAINING_METRICS)
    if (mean := _mean([row.get(name) for row in last])) is not None
  }
  of_layers = {name: mean for name, mean in means.items() if name.startswith("layer_")}
  whole = {name: mean for name, mean in means.items() if name not in of_layers}
  return {
    "curve": [[row["step"], row["eval_loss"]] for row in rows if "eval_loss" in row],
    "train": whole | {"per_layer": of_layers},
  }


def heldout(
  config: ExperimentConfig,
  data: PreparedData,
  model: nnx.State,
  domains: Mapping[str, str],
  interventions: Mapping[str, str],
) -> dict[str, Any]:
  """Evaluates a model, dropless, at its training capacity, by domain and under other routers.

  Args:
    config: of the run.
    data: it was trained on.
    model: all variables.
    domains: name and source of each held-out text that is evaluated alone.
    interventions: fields of the router by name, see `moe_jax.analysis.counterfactual`; left out
      for a model without experts.

  Returns:
    `eval`, `domains`, `interventions` (nats per token) and `routing` of the card.
  """
  evaluator = Evaluator(config, data)
  whole, at_capacity = evaluator.both(model)
  found: dict[str, Any] = {"eval": {"loss": whole.loss, "bits_per_byte": whole.bits_per_byte}}
  if at_capacity is not None:
    found["eval"] |= {
      "loss_at_capacity": at_capacity.loss,
      "dropped_fraction_at_capacity": at_capacity.dropped_fraction,
    }
  parts = domain_texts(config, domains)
  found["domains"] = {name: evaluator.on(part).dropless(model).loss for name, part in parts.items()}
  if config.model.moe is not None:
    found["interventions"] = {
      name: _under(evaluator, config, model, fields) for name, fields in interventions.items()
    }
    found["routing"] = _routing(config, model, parts or {"all": data})
  return found


def domain_texts(config: ExperimentConfig, domains: Mapping[str, str]) -> dict[str, PreparedData]:
  """Returns the text of each domain, prepared as that of the run."""
  alone = dataclasses.replace(config.data, corpus=DataConfig.corpus)
  return {
    name: prepare(dataclasses.replace(alone, sources=(source,))) for name, source in domains.items()
  }


def _under(
  evaluator: Evaluator, config: ExperimentConfig, model: nnx.State, fields: str
) -> dict[str, float]:
  changed = counterfactual(config.model, fields)
  result = evaluator.under(changed, part_of(changed, model)[1])
  return {"loss": result.loss, "dropped_fraction": result.dropped_fraction}


def _routing(
  config: ExperimentConfig, model: nnx.State, parts: Mapping[str, PreparedData]
) -> dict[str, Any]:
  """Returns how the held-out tokens are routed, dropless: means over layers, and each layer."""
  graph = model_graph(config.model.dropless())

  @jax.jit
  def loads(model, batch):
    _, aux = run_batch(nnx.merge(graph, model), batch)
    return [plan.metrics["load"] * plan.metrics["assignments"] for plan in aux.plans]

  def counts_of(part: PreparedData) -> np.ndarray:
    """Returns (layers, E) float64, assignments that ask for each expert over the held-out text."""
    batches = eval_batches(part.heldout, config.batch_size, transform=config.pair_maker)
    return sum(np.asarray(jax.device_get(loads(model, batch)), np.float64) for batch in batches)

  counts = np.stack([counts_of(part) for part in parts.values()])
  layers = [_layer(counts[:, layer]) for layer in range(counts.shape[1])]
  names = [name for name in layers[0] if name != "load"]
  means = {name: _mean([layer[name] for layer in layers]) for name in names}
  return {**means, "per_layer": layers}


def _layer(counts: np.ndarray) -> dict[str, Any]:
  """Returns the statistics of one layer from its counts (domains, E)."""
  total = counts.sum(axis=0)
  load = total / total.sum()
  statistics = {name: float(value) for name, value in load_statistics(load).items()}
  return statistics | {
    "load": load.tolist(),
    "load_cv": float(load.std() / load.mean()),
    "starved_experts": float(np.sum(load < 0.1 / len(load))),
    "domain_information": _information(counts),
  }


def _information(counts: np.ndarray) -> float:
  """Returns I(domain; expert) / H(domain), 0 to 1; 0 for a single domain.

  Domains are weighted alike, so that a longer held-out text counts no more than another.
  """
  joint = counts / counts.sum(axis=1, keepdims=True) / len(counts)
  apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
  some = joint > 0
  information = float(np.sum(joint[some] * np.log(joint[some] / apart[some])))
  return information / math.log(len(counts)) if len(counts) > 1 else 0.0


def _mean(values: Sequence[float | None]) -> float | None:
  there = [value for value in values if value is not None]
  return math.fsum(there) / len(there) if there else None
