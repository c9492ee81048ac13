"""The router as five stages: score -> select -> weigh -> place, then dispatch and combine."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe import arguments, capacity, losses, placement, scores, weights
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import Granularity, Noise, NullExpert, Priority
from moe_jax.moe.plan import DensePlan, RoutingPlan
from moe_jax.moe.registry import (
  Chooser,
  ExpertChoice,
  SelectView,
  SlotMixture,
  TokenChoice,
)
from moe_jax.moe.segments import mean_of_segment
from moe_jax.moe.summaries import (
  Asks,
  Call,
  asks_of_experts,
  asks_of_tokens,
  losses_of,
  metrics_of,
)


def route(
  logits: jax.Array,
  config: RoutingConfig,
  *,
  token_mask: jax.Array | None = None,
  token_ids: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  expert_ids: jax.Array | None = None,
  noise_scale: jax.Array | None = None,
  bias: jax.Array | None = None,
  global_load: jax.Array | None = None,
  key: jax.Array | None = None,
  train: bool = False,
) -> RoutingPlan | DensePlan:
  """Routes the tokens of each group to experts. Lossy where experts are full: see the metrics.

  Args:
    logits: (G, S, E') router logits, E' = `config.num_logits`, which is E but for null experts,
      hierarchical gates and Soft MoE; computed on in float32.
    config: the choice at every stage.
    token_mask: (G, S) bool, True = real token; None = all real. Padding takes no slot, has no
      weight, and enters no loss (but see `LossPadding`) and no metric.
    token_ids: (G, S) integers, for selections by token id.
    segment_ids: (G, S) integers, equal for consecutive tokens of one sequence; for
      `granularity = segment` and `balance_scope = sequence`.
    expert_ids: (G, S, K) integers below E, the experts that `selection = replay` forces; a negative
      id asks nobody.
    noise_scale: (G, S, E') standard deviation of the noise, for `noise = learned`.
    bias: (E',) added to the scores for selection alone, if that ranks experts; it receives no
      gradient.
    global_load: (E,), see `moe_jax.moe.losses.load_balance_loss`; with a communication loss (E +
      num_expert_groups,), followed by `moe_jax.moe.device_losses.device_fraction`.
    key: in training, for whatever the config draws: used as it is by a single stage that draws,
      split in the order noise, selection, placement where several do.
    train: picks the train or eval capacity factor; outside training nothing is random.

  Returns:
    A RoutingPlan; with `selection = soft` a DensePlan.

  Raises:
    UserError: shapes that do not fit, a missing argument, or training with a constant weight.
  """
  mask = arguments.checked_mask(logits, config, token_mask)
  ids = {"token_ids": token_ids, "segment_ids": segment_ids, "expert_ids": expert_ids}
  arguments.check_ids(config, mask.shape, ids)
  arguments.check_vectors(config, bias, global_load)
  if train:
    config.check_trainable()
    arguments.check_key(config, key)
  with jax.named_scope("route"):
    # Whatever stands in padding, an infinity or a NaN too, must reach no sum and no gradient.
    logits = jnp.where(mask[..., None], logits.astype(jnp.float32), 0.0)
    if config.granularity == Granularity.SEGMENT:
      logits = mean_of_segment(logits, mask, segment_ids)
    keys = _split_key(key if train else None, config)
    noise, std = _noise(logits, config, keys["noise"], noise_scale, mask)
    view = _view(logits + noise, config, mask, bias, ids, keys["select"], train)
    call = Call(view, config, logits, std, global_load)
    chosen = config.selector.function(view, config)
    arguments.check_choice(config, chosen)
    return _PLANS[config.selector.chooser](call, chosen, keys["place"])


def _split_key(key, config):
  """Returns a key for each stage that draws, None for the others."""
  draws = {
    "noise": config.noise != Noise.NONE,
    "select": config.selector.draws,
    "place": config.priority == Priority.RANDOM,
  }
  names = [name for name, does in draws.items() if does]
  keys = dict.fromkeys(draws)
  if key is not None and names:
    own = [key] if len(names) == 1 else jax.random.split(key, len(names))
    keys.update(zip(names, own, strict=True))
  return keys


def _noise(logits, config, key, noise_scale, mask):
  """Returns noise for real tokens and its standard deviation (None for other than normal noise)."""
  if key is None:
    return 0.0, None
  std = None
  if config.noise != Noise.GUMBEL:
    # Padding may hold anything, and the load loss divides by its standard deviation.
    std = jnp.where(mask[..., None], scores.noise_std(logits.shape, config, noise_scale), 1.0)
  return jnp.where(mask[..., None], scores.draw_noise(logits.shape, config, key, std), 0.0), std


def _view(logits, config, mask, bias, ids, key, train):
  """Scores the tokens, and applies to `ranking` what only selection sees."""
  score = scores.score_logits(logits, config)
  ranking = jax.lax.stop_gradient(score if bias is None else score + bias[None, None])
  if config.num_expert_groups > 1 and config.selector.ranked:
    ranking = scores.limit_to_groups(ranking, config)
  slots = capacity.expert_capacity(config, mask.shape[1], train=train)
  return SelectView(score, ranking, logits, mask, key=key, capacity=slots, train=train, **ids)


def _token_plan(call: Call, chosen: TokenChoice, key: jax.Array | None) -> RoutingPlan:
  """Places what tokens asked for."""
  view, config, E = call.view, call.config, call.config.num_experts
  G, S, K = chosen.expert.shape
  asked = chosen.used & view.mask[..., None]
  real, null = asked & (chosen.expert < E), asked & (chosen.expert >= E)
  score = jnp.take_along_axis(view.scores, chosen.expert, axis=-1)
  wished = _weigh(view, chosen, chosen.expert, asked, config)
  order = wished if config.priority == Priority.WEIGHT else score
  best = jnp.max(view.scores, axis=-1)
  placed = placement.place(
    chosen.expert, real, view.ranking, order, best, config, capacity=view.capacity, key=key
  )
  weight = _weigh(view, chosen, placed.expert, placed.kept | null, config)
  token = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[:, None], (G, S, K))
  columns = token, placed.expert, placed.slot, jnp.where(null, 0.0, weight), placed.kept
  asks = asks_of_tokens(chosen.expert, real, placed, wished, E)
  return RoutingPlan(
    *(a.reshape(G, S * K) for a in columns),
    identity=_identity(weight, null, config),
    losses=losses_of(call, asks),
    metrics=metrics_of(call, asks),
    num_tokens=S,
    num_experts=E,
    capacity=view.capacity,
    top_k=K,
    weight_on=config.weight_on,
  )


def _weigh(view, chosen, expert, kept, config):
  if chosen.weight is not None:
    return jnp.where(kept, chosen.weight, 0.0) * config.weight_scale
  return weights.weigh(view.scores, view.logits, expert, kept, config)


def _identity(weight, null, config):
  """Returns (G, S), the weight of a token in its own output, or None."""
  if not config.num_null_experts or config.null_expert == NullExpert.ZERO:
    return None
  return jnp.sum(jnp.where(null, weight, 0.0), axis=-1)


def _expert_plan(call: Call, chosen: ExpertChoice, key: None) -> RoutingPlan:
  """Lists what experts took; slot c of an expert holds its c-th best token."""
  view, config = call.view, call.config
  G, E, C = chosen.token.shape
  score = jnp.take_along_axis(view.scores.swapaxes(1, 2), chosen.token, axis=-1)
  weight = weights.discrete(score, config.weighting) * config.weight_scale
  expert = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32)[:, None], (G, E, C))
  slot = jnp.broadcast_to(jnp.arange(C, dtype=jnp.int32), (G, E, C))
  columns = chosen.token, expert, slot, jnp.where(chosen.taken, weight, 0.0), chosen.taken
  asks = asks_of_experts(chosen.token, chosen.taken, weight, view.mask.shape[1])
  return RoutingPlan(
    *(a.reshape(G, E * C) for a in columns),
    identity=None,
    losses=losses_of(call, asks),
    metrics=metrics_of(call, asks),
    num_tokens=view.mask.shape[1],
    num_experts=E,
    capacity=C,
    weight_on=config.weight_on,
  )


def _dense_plan(call: Call, chosen: SlotMixture, key: None) -> DensePlan:
  """Every token enters every slot; the load is each expert's share of the outputs."""
  view = call.view
  z = losses.router_z_loss(call.logits, view.mask, call.config.loss_padding)
  share = jnp.sum(chosen.combine, axis=-1)
  call = dataclasses.replace(call, view=dataclasses.replace(view, scores=share))
  # A token asks all E experts, and is refused by none.
  asked = call.config.num_experts * share
  metrics = metrics_of(call, Asks(asked, asked, asked, asked, share))
  metrics["capacity_utilization"] = jnp.mean(jnp.any(view.mask, axis=1), dtype=jnp.float32)
  return DensePlan(chosen.dispatch, chosen.combine, {"router_z": z}, metrics)


_PLANS = {
  Chooser.TOKEN: _token_plan,
  Chooser.EXPERT: _expert_plan,
  Chooser.SLOT: _dense_plan,
}
