"""The routing of a run's checkpoints over the same held-out tokens, recorded and measured."""

import itertools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from moe_jax.analysis.replay import join_traces
from moe_jax.analysis.router_metrics.similarity import weight_similarity
from moe_jax.analysis.routing_measures import Domains, Measure, measure_changes, measure_routing
from moe_jax.analysis.routing_trace import RoutingTrace, record_routing
from moe_jax.data.builders import PreparedData
from moe_jax.data.loader import eval_batches
from moe_jax.models import ModelConfig
from moe_jax.models.moe_stacks import moe_stacks
from moe_jax.models.run_batch import run_batch


class RoutingRecorder:
  """Routes the same tokens with several checkpoints of one model.

  Args:
    graph: the model without its variables, dropless.
    texts: held-out texts by the name of their domain.
    batch_size: rows routed at a time.
    count: batches of each text.

  Attributes:
    domains: of the rows of every trace.
    tokenizer: of the texts.
    confidence: mean largest probability of each layer's router in the last trace.
  """

  def __init__(
    self, graph: nnx.GraphDef, texts: Mapping[str, PreparedData], batch_size: int, count: int
  ):
    self._batches: list[dict[str, jax.Array]] = []
    rows: list[int] = []
    for index, data in enumerate(texts.values()):
      mine = list(itertools.islice(eval_batches(data.heldout, batch_size), count))
      self._batches += mine
      rows += [index] * (batch_size * len(mine))
    self.domains = Domains(tuple(texts), np.array(rows))
    self.tokenizer = next(iter(texts.values())).tokenizer
    self.confidence: list[float] = []

    @jax.jit
    def plans_of(model, batch):
      return run_batch(nnx.merge(graph, model), batch)[1].plans

    self._plans_of = plans_of

  def trace(self, model: nnx.State, step: int, run: str) -> RoutingTrace:
    """Returns the routing of all batches; notes the confidence of the routers."""
    traces, sums, tokens = [], 0.0, 0
    for batch in self._batches:
      plans = self._plans_of(model, batch)
      masks = {"token_mask": batch["segment_ids"] > 0, "segment_ids": batch["segment_ids"]}
      traces.append(record_routing(plans, batch["tokens"], run=run, step=step, **masks))
      real = int(masks["token_mask"].sum())
      sums += real * np.array([float(plan.metrics["router_confidence"]) for plan in plans])
      tokens += real
    self.confidence = (sums / max(tokens, 1)).tolist()
    return join_traces(traces)


def measure_checkpoints(
  config: ModelConfig, recorder: RoutingRecorder, traces: Sequence[RoutingTrace], model: nnx.State
) -> list[Measure]:
  """Returns all measures of the last checkpoint, and how routing moved on the way to it.

  Args:
    config: of the model.
    recorder: that made the traces, the last one last.
    traces: in the order of their steps.
    model: variables of the last checkpoint.
  """
  last = traces[-1]
  measures = measure_routing(last, recorder.domains, config.vocab_size)
  for layer, value in enumerate(recorder.confidence):
    floor = 1 / last.layers[layer].num_experts
    measures.append(Measure("router_confidence", layer, value, floor))
  return measures + _similarities(config, model) + measure_changes(traces)


def _similarities(config: ModelConfig, model: nnx.State) -> list[Measure]:
  flat, found = nnx.to_flat_state(model), []
  number = len(config.moe_layers())
  for stack in moe_stacks(config):
    path = (*stack.path, "experts")
    weights = [leaf[...] for name, leaf in flat if name[: len(path)] == path]
    for repeat, layer in enumerate(stack.layers):
      # No evaluation runs the experts of multi-token prediction.
      if layer < number:
        value = weight_similarity([array[repeat] for array in weights])
        found.append(Measure("weight_similarity", layer, float(value), 0.0))
  return sorted(found, key=lambda measure: measure.layer)
