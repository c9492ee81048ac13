"""Recorded experts forced on a model: what of a loss is due to who was chosen."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moe_jax.analysis.counterfactual import part_of
from moe_jax.analysis.routing_trace import RoutingTrace
from moe_jax.errors import UserError
from moe_jax.models import ModelConfig
from moe_jax.moe import RouterInputs


def join_traces(traces: Sequence[RoutingTrace]) -> RoutingTrace:
  """Returns the trace of all rows of several traces of one checkpoint, in order."""

  def join(parts, names):
    return {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}

  layers = tuple(
    dataclasses.replace(layers[0], **join(layers, ("expert", "weight", "kept")))
    for layers in zip(*(trace.layers for trace in traces), strict=True)
  )
  rows = join(traces, ("tokens", "token_mask", "segment_ids"))
  return dataclasses.replace(traces[0], layers=layers, **rows)


def replayed_loss(
  config: ModelConfig, model: nnx.State, trace: RoutingTrace
) -> tuple[float, float]:
  """Returns the loss of a trace's tokens, nats per token: with the model's own and its experts.

  Both are dropless. Weights come from the model's router also where experts are forced.

  Args:
    config: of the model, with the trace's number of MoE layers, experts and choices.
    model: the variables of the model.
    trace: of this or another checkpoint. An assignment that was not kept asks nobody.

  Raises:
    UserError: a trace that does not fit the model, or tokens outside its vocabulary.
  """
  forced = check_replay(config, trace)
  ids = [np.where(layer.kept, layer.expert, -1) for layer in trace.layers]
  inputs = RouterInputs(expert_ids=jnp.asarray(np.stack(ids), jnp.int32))
  return _loss(config.dropless(), model, trace, RouterInputs()), _loss(forced, model, trace, inputs)


def check_replay(config: ModelConfig, trace: RoutingTrace) -> ModelConfig:
  """Returns the config that forces a trace's experts on the parameters of a model of `config`.

  Raises:
    UserError: a trace that does not fit the model, tokens outside its vocabulary, a router that
      cannot weigh experts that another one selected, or an encoder-decoder.
  """
  if config.encoder is not None:
    raise UserError("an encoder-decoder replays no trace: traces are of decoders alone")
  layers = len(config.moe_layers())
  if not layers or len(trace.layers) != layers:
    raise UserError(
      f"the trace has {len(trace.layers)} MoE layers and the model {layers}: they must be equal"
    )
  routing = config.moe.routing
  for layer in trace.layers:
    have, expected = (
      (layer.num_experts, layer.expert.shape[-1]),
      (routing.num_experts, routing.top_k),
    )
    if have != expected:
      raise UserError(
        f"the trace has (num_experts, top_k) = {have} and the model {expected}: they must be equal"
      )
  if trace.tokens.max(initial=0) >= config.vocab_size:
    raise UserError(
      f"the trace has token id {trace.tokens.max()}; the model's vocabulary is {config.vocab_size}"
    )
  forced = config.with_routing(**_REPLAY).dropless()
  if forced.moe.routing.num_logits != routing.num_logits:
    raise UserError(
      f"selection = {routing.selection} has {routing.num_logits} logits for num_experts ="
      f" {routing.num_experts}: its router cannot weigh experts that a trace forces"
    )
  return forced


# What steers, reroutes or judges a selection that is not made any more.
_REPLAY = dict(
  selection="replay",
  bias_update="none",
  num_expert_groups=1,
  top_expert_groups=1,
  overflow="dropless",
  capacity=None,
  load_loss_weight=0.0,
  device_loss_weight=0.0,
  communication_loss_weight=0.0,
)


def _loss(config: ModelConfig, model: nnx.State, trace: RoutingTrace, inputs) -> float:
  graph, model = part_of(config, model)

  @jax.jit
  def loss(model, tokens, mask, segments, inputs):
    call = dict(token_mask=mask, segment_ids=segments, router_inputs=inputs)
    logits = nnx.merge(graph, model)(tokens, **call)[:, :-1]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    counted = mask[:, 1:] & mask[:, :-1] & (segments[:, 1:] == segments[:, :-1])
    return jnp.sum(nll * counted) / jnp.maximum(jnp.sum(counted), 1)

  return float(loss(model, trace.tokens, trace.token_mask, trace.segment_ids, inputs))
