"""One optimiser step and one evaluation batch, as pure functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.models import ModelAux, ModelConfig
from moe_jax.moe.metrics import load_statistics, max_violation_floor
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.optimizer import learning_rate_schedule
from moe_jax.training.state import Stream, TrainState, model_graph, stream_key

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def run_batch(model, batch: Batch, **call: Any) -> tuple[jax.Array, ModelAux]:
  """Returns the logits and the aux record of a batch of packed records; see `token_nll`."""
  return model(
    batch["tokens"],
    token_mask=batch["segment_ids"] > 0,
    segment_ids=batch["segment_ids"],
    positions=batch["positions"],
    return_aux=True,
    **call,
  )


def token_nll(model, batch: Batch, **call: Any) -> tuple[jax.Array, ModelAux]:
  """Returns the summed negative log-likelihood (nats) of the batch's targets, and the aux record.

  Args:
    model: the language model.
    batch: `tokens`, `targets`, `segment_ids`, `positions`, `loss_mask`, each (B, L) int32.
    **call: passed to the model.
  """
  logits, aux = run_batch(model, batch, **call)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
  return jnp.sum(nll * batch["loss_mask"]), aux


def make_train_step(
  config: ExperimentConfig, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns step(state, batch) -> (state, metrics), compiled, the old state donated.

  The language-model loss is the mean over all targets of the batch, however it is cut into
  microbatches; the weighted router losses are averaged over microbatches.
  """
  graph = model_graph(config.model)
  schedule = learning_rate_schedule(config.optimizer, config.steps)

  def objective(params, batch, key, num_targets):
    nll, aux = token_nll(nnx.merge(graph, params), batch, train=True, key=key)
    routed = aux.weighted_loss / config.accumulation_steps
    return nll / num_targets + routed, _microbatch_metrics(nll / num_targets, aux)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(stream_key(config.seed, Stream.STEP), state.step)
    grads, metrics = _accumulate(objective, state.params, batch, key, config.accumulation_steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = _step_metrics(metrics, config, batch["tokens"].size)
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = schedule(state.step)
    return TrainState(state.step + 1, params, opt_state), metrics

  return jax.jit(step, donate_argnums=0)


def make_eval_step(config: ModelConfig) -> Callable[[nnx.State, Batch], Metrics]:
  """Returns eval(params, batch) -> summed `nll` in nats, `targets`, and `dropped` assignments."""
  graph = model_graph(config)

  def evaluate(params: nnx.State, batch: Batch) -> Metrics:
    nll, aux = token_nll(nnx.merge(graph, params), batch)
    real = jnp.sum(batch["segment_ids"] > 0)
    dropped = aux.metrics.get("dropped_fraction", jnp.float32(0)) * real
    return {"nll": nll, "targets": jnp.sum(batch["loss_mask"]), "tokens": real, "dropped": dropped}

  return jax.jit(evaluate)


def _accumulate(objective, params, batch, key, count: int):
  """Sums gradients and metrics over `count` microbatches, one in memory at a time."""
  num_targets = jnp.maximum(jnp.sum(batch["loss_mask"]), 1)
  grad = jax.grad(objective, has_aux=True)
  if count == 1:
    return grad(params, batch, key, num_targets)
  cut = jax.tree.map(lambda a: a.reshape((count, -1) + a.shape[1:]), batch)

  def add(total, microbatch):
    return jax.tree.map(jnp.add, total, grad(params, *microbatch, num_targets)), None

  keys = jax.random.split(key, count)
  first = jax.tree.map(lambda a: a[0], (cut, keys))
  shapes = jax.eval_shape(grad, params, *first, num_targets)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  return jax.lax.scan(add, zeros, (cut, keys))[0]


def _microbatch_metrics(loss: jax.Array, aux: ModelAux) -> dict:
  """Collects what is summed over microbatches; loads as counts, since they add up."""
  layers = []
  for plan in aux.plans:
    counts = plan.metrics["load"] * plan.metrics["assignments"]
    layers.append({**plan.metrics, "load": counts})
  depths = [{"loss": depth.loss, **depth.metrics} for depth in aux.depths]
  return {"loss": loss, "losses": aux.losses, "layers": layers, "depths": depths}


def _step_metrics(summed: dict, config: ExperimentConfig, num_tokens: int) -> Metrics:
  """Names a step's metrics: loads are those of the whole step, other router metrics means."""
  metrics, count = {"loss": summed["loss"]}, config.accumulation_steps
  for index, depth in zip(config.model.depth_layers(), summed["depths"], strict=True):
    metrics.update({f"depth/layer_{index}/{name}": depth[name] / count for name in depth})
  if not summed["layers"]:
    return metrics
  routing = config.model.moe.routing
  metrics["aux_loss"] = summed["losses"]["load_balance"] / count
  metrics["z_loss"] = summed["losses"]["router_z"] / count
  floor = max_violation_floor(num_tokens * routing.top_k, routing.num_experts)
  layers = []
  for layer in summed["layers"]:
    means = {name: value / count for name, value in layer.items()}
    load = layer["load"] / jnp.maximum(layer["assignments"], 1.0)
    whole = {"load": load, "assignments": layer["assignments"], **load_statistics(load)}
    layers.append({**means, **whole, "max_violation_floor": jnp.float32(floor)})
  for index, layer in zip(config.model.moe_layers(), layers, strict=True):
    metrics.update({f"moe/layer_{index}/{name}": value for name, value in layer.items()})
  for name in layers[0]:
    if name != "load":
      metrics[f"moe/{name}"] = sum(layer[name] for layer in layers) / len(layers)
  return metrics
