"""What `moe-jax convert upcycle | prune | merge | grow` starts from: a run, or a hub checkpoint."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.analysis.routing_trace import RoutingTrace
from moe_jax.commands.source import check_source
from moe_jax.convert import load_pretrained
from moe_jax.convert.surgery.layer_trees import Leaves
from moe_jax.data.builders import PreparedData, prepare
from moe_jax.data.loader import eval_batches
from moe_jax.data.loader_state import save_state
from moe_jax.errors import UserError
from moe_jax.models.run_batch import run_batch
from moe_jax.moe.router import RouterState
from moe_jax.training.config import ExperimentConfig, experiment_from
from moe_jax.training.new_run import config_fields
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.run_folder import METRICS_FILE
from moe_jax.training.saved_run import load_state
from moe_jax.training.state import TrainState, model_graph
from moe_jax.training.stream import stream_of, training_batches
from moe_jax.training.template import full_config
from moe_jax.training.transplant import host_leaves
from moe_jax.training.writers import rows_until


@dataclasses.dataclass(frozen=True)
class Source:
  """A model and its training so far.

  Attributes:
    path: the folder it was read from.
    config: of its run; defaults but for the model where it is a checkpoint of the hub.
    state: of its run, before the first step where it is a checkpoint of the hub.
    place: in the data, as checkpoints keep it; None for the beginning.
    metrics: the rows up to the state's step, without those of routers, which are about to change.
  """

  path: Path
  config: ExperimentConfig
  state: TrainState
  place: dict[str, Any] | None
  metrics: str

  @functools.cached_property
  def data(self) -> PreparedData:
    """The data of the run."""
    return prepare(self.config.data)

  @functools.cached_property
  def leaves(self) -> Leaves:
    """The arrays of the model, on the host."""
    return host_leaves(self.state.model)

  def batches(self, count: int) -> list[dict[str, jax.Array]]:
    """Returns the first batches of the held-out split."""
    size = self.config.eval.batch_size or self.config.batch_size
    batches = eval_batches(self.data.heldout, size)
    return [batch for batch, _ in zip(batches, range(count), strict=False)]

  def usage(self, args: SimpleNamespace) -> list[np.ndarray]:
    """Returns for each MoE layer (E,) float64, how often its experts got a token.

    From --trace, or from the first --batches held-out batches.

    Raises:
      UserError: a trace of another model, or experts that no evaluation runs.
    """
    model = self.config.model
    if model.moe_layers(train=True) != model.moe_layers():
      raise UserError(
        f"mtp_depth = {model.mtp_depth} is refused: no evaluation runs the experts of multi-token"
        " prediction, so their use is not known; use prune with --by=norm or --drop"
      )
    if args.trace is not None:
      return _usage_in_trace(Path(args.trace), self.config)
    return self._measured_usage(args.batches)

  def _measured_usage(self, count: int) -> list[np.ndarray]:
    graph, experts = model_graph(self.config.model.dropless()), self._num_experts

    @jax.jit
    def counts(model, batch):
      plans = run_batch(nnx.merge(graph, model), batch)[1].plans
      return [jnp.zeros(experts).at[plan.expert].add(plan.valid, mode="drop") for plan in plans]

    found = [counts(self.state.model, batch) for batch in self.batches(count)]
    return [np.sum(layer, axis=0, dtype=np.float64) for layer in zip(*found, strict=True)]

  @property
  def _num_experts(self) -> int:
    return self.config.model.moe.routing.num_experts


def _usage_in_trace(path: Path, config: ExperimentConfig) -> list[np.ndarray]:
  trace, experts = RoutingTrace.load(path), config.model.moe.routing.num_experts
  have = [layer.num_experts for layer in trace.layers]
  need = [experts] * len(config.model.moe_layers())
  if have != need:
    raise UserError(
      f"--trace={path} is of a model with {have} experts in its MoE layers, expected {need}; record"
      " one with moe-jax trace"
    )
  return [
    np.bincount(layer.expert[layer.kept], minlength=experts).astype(np.float64)
    for layer in trace.layers
  ]


def read_source(args: SimpleNamespace) -> Source:
  """Reads --workdir, at --step, or --checkpoint.

  Raises:
    UserError: not exactly one of the two, one that cannot be read, or an encoder-decoder.
  """
  check_source("convert", args, of_run=("step",))
  source = _read_run(args) if args.workdir is not None else _read_checkpoint(Path(args.checkpoint))
  if source.config.model.encoder is not None:
    raise UserError(f"{source.path} holds an encoder-decoder; surgery is of decoders alone")
  return source


def _read_run(args: SimpleNamespace) -> Source:
  path = Path(args.workdir)
  config, state, place = load_state(path, args.step)
  if place.get("owed"):
    raise UserError(
      f"{path} was told to end while it evaluated step {state.step}, and the checkpoint owes that"
      " row of the metrics; go on with the run for a step, or name another one by --step"
    )
  lines = [line for _, line in rows_until(path / METRICS_FILE, int(state.step))]
  return Source(path, config, state, place, "".join(map(_without_routers, lines)))


def _without_routers(line: bytes) -> str:
  row = {name: value for name, value in json.loads(line).items() if not name.startswith("moe/")}
  return json.dumps(row) + "\n"


def _read_checkpoint(path: Path) -> Source:
  """Reads a checkpoint of the hub in float32, for a run of defaults."""
  model, config = load_pretrained(path)
  fields = config_fields(ExperimentConfig(model=config))
  experiment = experiment_from(full_config(fields).to_dict())
  params, router_state = nnx.state(model, nnx.Param), nnx.state(model, RouterState)
  opt_state = make_optimizer(experiment.optimizer, experiment.steps).init(params)
  state = TrainState(jnp.int32(0), params, router_state, opt_state, None)
  return Source(path, experiment, state, None, "")


def beginning(config: ExperimentConfig, data: PreparedData) -> dict[str, Any]:
  """Returns the place in the data before the first step, as checkpoints keep it."""
  batches = training_batches(config, data)
  return {"stream": save_state(batches, stream_of(config, data)), "wall_seconds": 0.0}
