"""One optimiser step and one evaluation batch, as pure functions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.models import ModelAux, ModelConfig
from moe_jax.models.run_batch import run_batch
from moe_jax.moe import BalanceScope, RouterInputs
from moe_jax.moe.losses import loss_weights
from moe_jax.moe.metrics import max_violation_floor
from moe_jax.sharding.layout import Layout
from moe_jax.sharding.pipeline import num_stages
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.faults_config import OnNonfinite
from moe_jax.training.layer_metrics import LayerMetrics, ratios, summands
from moe_jax.training.microbatches import (
  Batch,
  Microbatches,
  Share,
  by_layer,
  cut,
  num_places_by_layer,
  real_tokens,
  real_tokens_by_layer,
  sum_over,
)
from moe_jax.training.nonfinite import FINITE, is_finite, keep_old_unless
from moe_jax.training.optimizer import learning_rate_schedule, num_updates
from moe_jax.training.placed import compile_for, constrain_batch, like_parameters
from moe_jax.training.repair import count_load, repair_cold_experts
from moe_jax.training.router_state import state_metrics, update_router_state
from moe_jax.training.state import (
  Stream,
  TrainState,
  abstract_state,
  model_graph,
  state_shardings,
  stream_key,
)

Metrics = dict[str, jax.Array]

# What balancing reads of a step's layers, and nobody else.
_NOT_LOGGED = frozenset({"balance_load", "bias_target"})
_LOSS_NAMES = {
  "load_balance": "aux_loss",
  "router_z": "z_loss",
  "importance": "moe/importance_loss",
  "load": "moe/load_loss",
  "device_balance": "moe/device_balance_loss",
  "communication": "moe/communication_loss",
}
# Logged whatever their coefficients are: they tell how a router does that is balanced otherwise.
_ALWAYS_LOGGED = frozenset({"load_balance", "router_z"})


def token_nll(model, batch: Batch, **call: Any) -> tuple[jax.Array, ModelAux]:
  """Returns the summed negative log-likelihood (nats) of the batch's targets, and the aux record.

  Args:
    model: the language model.
    batch: `tokens`, `targets`, `segment_ids`, `positions`, `loss_mask`, each (B, L) int32; of an
      encoder-decoder also `source_tokens` and `source_segment_ids`, see `moe_jax.data.objectives`;
      of a model that reads images also `pixel_values`, see `moe_jax.models.Decoder`, with
      accumulation as many images for every microbatch.
    **call: passed to the model.
  """
  logits, aux = run_batch(model, batch, **call)
  return _nll(logits, batch), aux


def _nll(logits: jax.Array, batch: Batch) -> jax.Array:
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
  return jnp.sum(nll * batch["loss_mask"])


def multi_token_nll(aux: ModelAux, batch: Batch) -> jax.Array:
  """Returns the mean over depths of their summed negative log-likelihoods (nats); 0 without.

  DeepSeek-V3, arXiv 2412.19437 Eqs. 24 and 25. Depth k at a place predicts the target k places on,
  where that belongs to the same document.
  """
  total = jnp.float32(0.0)
  for depth, logits in enumerate(aux.mtp_logits, start=1):
    segments = batch["segment_ids"]
    same = segments[:, depth:] == segments[:, :-depth]
    nll = optax.softmax_cross_entropy_with_integer_labels(
      logits[:, :-depth], batch["targets"][:, depth:]
    )
    total += jnp.sum(nll * batch["loss_mask"][:, depth:] * same)
  return total / max(1, len(aux.mtp_logits))


def make_train_step(
  config: ExperimentConfig,
  optimizer: optax.GradientTransformation,
  layout: Layout | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns step(state, batch) -> (state, metrics), compiled, the old state donated.

  The language-model loss is the mean over all targets of the batch, however it is cut into
  microbatches. Router losses are means over a microbatch, and are averaged over microbatches
  weighted by the tokens they count, an encoder's by its own: so those that are means over tokens
  (z-loss, and load balance under `balance_scope = global_batch`) are exactly those of the whole
  batch. Router state is updated once, from what the whole step routed. The loss of multi-token
  prediction is divided by all targets too, as in its paper. Metrics are those of the whole step:
  ratios of sums, not means of ratios; those of router state are read after its update. All of this
  holds over a whole mesh, whatever its layout.

  The metric `finite` tells whether the loss and the gradients are; unless `faults.on_nonfinite` is
  `stop`, a step that is not leaves all but the number of steps as it was.
  """
  graph = model_graph(config.model)
  schedule = learning_rate_schedule(config.optimizer, config.steps)

  def objective(params, router_state, inputs, num_targets, batch, key, share: Share):
    model = nnx.merge(graph, params, router_state)
    nll, aux = token_nll(model, batch, train=True, key=key, router_inputs=inputs)
    loss, further = nll / num_targets, multi_token_nll(aux, batch) / num_targets
    total = loss + config.model.mtp_loss_weight * further + aux.weighted_loss * share.losses
    shares = by_layer(config.model, share, share.encoder)
    total += _owed_to_encoder(aux.weighted_losses, shares, share)
    return total, _summands(loss, aux, shares, share) | {"mtp_loss": further}

  def gradient(state: TrainState, batch: Batch, parts: Microbatches):
    parts = dataclasses.replace(parts, batch=constrain_batch(parts.batch))
    num_targets = jnp.maximum(jnp.sum(batch["loss_mask"]), 1)
    inputs = RouterInputs(
      global_load=_global_load(graph, state, parts) if _needs_global_load(config) else None,
      copied=None if state.placement is None else state.placement.copied,
    )
    known = state.router_state, inputs, num_targets

    def of_part(*part):
      grads, summed = jax.grad(objective, has_aux=True)(state.params, *known, *part)
      return like_parameters(grads), summed

    def of_all(params):
      return sum_over(functools.partial(objective, params, *known), parts)

    if num_stages(layout) == 1:
      return sum_over(of_part, parts)
    grads, summed = jax.grad(of_all, has_aux=True)(state.params)
    return like_parameters(grads), summed

  undoing = config.faults.on_nonfinite != OnNonfinite.STOP

  def step(old: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    state = old
    key = jax.random.fold_in(stream_key(config.seed, Stream.STEP), state.step)
    routing = config.model.moe.routing if config.model.moe else None
    grads, summed = gradient(state, batch, cut(batch, key, config.accumulation_steps, routing))
    layers = [ratios(layer) for layer in summed["layers"]]
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    tokens = real_tokens_by_layer(batch, config.model)
    router_state = update_router_state(state.router_state, layers, tokens, config.model)
    windows = (count_load(window, layers) for window in (state.repair, state.placement))
    state = TrainState(state.step + 1, params, router_state, opt_state, *windows)
    state = repair_cold_experts(state, optimizer, config)
    grad_norm = optax.tree.norm(grads)
    finite = is_finite(summed["loss"], grad_norm, updates if undoing else None)
    if undoing:
      state = keep_old_unless(finite, state, old)
    places = num_places_by_layer(batch, config.model)
    metrics = {
      "loss": summed["loss"],
      **({"mtp_loss": summed["mtp_loss"]} if config.model.mtp_depth else {}),
      "grad_norm": grad_norm,
      "learning_rate": schedule(num_updates(old.opt_state) if undoing else state.step - 1),
      FINITE: finite,
      **_depth_metrics(summed["depths"], config),
      **_router_metrics(layers, summed["losses"], state, config, places),
    }
    return state, metrics

  places = None
  if layout is not None:
    # Named, so that every step finds the state where the first one did.
    state = abstract_state(config.model, optimizer, config.repair, balance=config.balance_placement)
    places = state_shardings(state, layout), layout.replicated
  return compile_for(layout, step, donate_argnums=0, out_shardings=places)


def make_eval_step(
  config: ModelConfig, layout: Layout | None = None
) -> Callable[[nnx.State, Batch], Metrics]:
  """Returns eval(model, batch) -> sums over a batch; `model` is `TrainState.model`.

  The sums are `nll` in nats, `targets`, `tokens`, and over MoE layers the assignments `asked` for
  and those `dropped`; of a batch with images also the `images`, and those `right`, of which every
  target is the likeliest token, so that a greedy continuation of the image is the text.
  """
  graph = model_graph(config)

  def evaluate(model: nnx.State, batch: Batch) -> Metrics:
    logits, aux = run_batch(nnx.merge(graph, model), batch)
    asked = [plan.metrics["assignments"] for plan in aux.plans]
    fractions = [plan.metrics["dropped_fraction"] for plan in aux.plans]
    return {
      "nll": _nll(logits, batch),
      "targets": jnp.sum(batch["loss_mask"]),
      "tokens": real_tokens(batch),
      "asked": sum(asked, jnp.float32(0)),
      "dropped": sum((a * f for a, f in zip(asked, fractions, strict=True)), jnp.float32(0)),
      **(_right(logits, batch) if "pixel_values" in batch else {}),
    }

  return compile_for(layout, evaluate, out_shardings=None if layout is None else layout.replicated)


def _right(logits: jax.Array, batch: Batch) -> Metrics:
  asked = batch["loss_mask"] > 0
  right = jnp.all((jnp.argmax(logits, axis=-1) == batch["targets"]) | ~asked, axis=1)
  images = jnp.any(asked, axis=1)
  return {"images": jnp.sum(images), "right": jnp.sum(images & right)}


def _needs_global_load(config: ExperimentConfig) -> bool:
  """Tells whether the balance loss of a microbatch needs what the others route."""
  if config.model.moe is None or config.accumulation_steps == 1:
    return False
  routing = config.model.moe.routing
  weights = loss_weights(routing)
  reads = any(weights[name] for name in ("load_balance", "device_balance", "communication"))
  return routing.balance_scope == BalanceScope.GLOBAL_BATCH and reads


def _global_load(graph: nnx.GraphDef, state: TrainState, parts: Microbatches) -> jax.Array:
  """Returns (MoE layers, num_load_fractions) float32, f of the whole step (arXiv 2501.11873).

  A forward pass of its own over all microbatches, with the random numbers of the one that
  follows: the price of f being known before the first gradient.
  """
  variables = state.model

  def load(batch, key, share):
    model = nnx.merge(graph, variables)
    _, aux = run_batch(model, batch, train=True, key=key)
    shares = by_layer(model.config, share, share.encoder)
    loads = zip(aux.plans, shares, strict=True)
    return jnp.stack([plan.metrics["balance_load"] * own.losses for plan, own in loads])

  return sum_over(load, parts)


def _summands(loss: jax.Array, aux: ModelAux, shares: list[Share], share: Share) -> dict:
  """Returns what is summed over microbatches; `shares` has one a MoE layer."""
  losses = _scaled(aux.losses, share.losses)
  for name in aux.plans[0].losses if aux.plans else ():
    of_layers = [plan.losses[name] for plan in aux.plans]
    losses[name] += _owed_to_encoder(of_layers, shares, share) / len(aux.plans)
  return {
    "loss": loss,
    "losses": losses,
    "layers": [summands(p.metrics, own) for p, own in zip(aux.plans, shares, strict=True)],
    "depths": [_scaled({"loss": each.loss, **each.metrics}, share.tokens) for each in aux.depths],
  }


def _owed_to_encoder(losses: list[jax.Array], shares: list[Share], share: Share) -> jax.Array:
  """Returns what a sum over MoE layers lacks that weighs an encoder's as its decoder's."""
  owed = (
    loss * (own.losses - share.losses)
    for loss, own in zip(losses, shares, strict=True)
    if own is not share
  )
  return sum(owed, jnp.float32(0.0))


def _scaled(metrics: Metrics, factor: jax.Array) -> Metrics:
  return {name: value * factor for name, value in metrics.items()}


def _depth_metrics(depths: list[Metrics], config: ExperimentConfig) -> Metrics:
  """Names the metrics of the blocks that only some tokens take."""
  return {
    f"depth/layer_{index}/{name}": value
    for index, depth in zip(config.model.depth_layers(), depths, strict=True)
    for name, value in depth.items()
  }


def _router_metrics(
  layers: list[LayerMetrics],
  losses: Metrics,
  state: TrainState,
  config: ExperimentConfig,
  num_tokens: list[int],
) -> Metrics:
  """Names a step's router metrics: by layer, and means over layers; nothing without layers."""
  if not layers:
    return {}
  routing, weights = config.model.moe.routing, loss_weights(config.model.moe.routing)
  floors = [
    jnp.float32(max_violation_floor(n * routing.top_k, routing.num_experts)) for n in num_tokens
  ]
  metrics = {
    _LOSS_NAMES[name]: value
    for name, value in losses.items()
    if weights.get(name) or name in _ALWAYS_LOGGED
  }
  logged = [
    {name: value for name, value in layer.items() if name not in _NOT_LOGGED}
    | {"max_violation_floor": floor, **own}
    for layer, floor, own in zip(
      layers, floors, state_metrics(state.router_state, config.model), strict=True
    )
  ]
  for index, layer in zip(config.model.moe_layers(train=True), logged, strict=True):
    metrics.update({f"moe/layer_{index}/{name}": value for name, value in layer.items()})
  for name in logged[0]:
    if name != "load":
      metrics[f"moe/{name}"] = sum(layer[name] for layer in logged) / len(logged)
  if state.repair is not None:
    metrics["moe/repaired_experts"] = state.repair.repaired
  if state.placement is not None:
    born = state.placement.born
    metrics["moe/displaced_experts"] = jnp.sum(born != jnp.arange(born.shape[1])[None])
  return metrics
