"""What a routing decision adds up to: who asked for what, and the losses and metrics of it."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe import device_losses, losses, scores
from moe_jax.moe.balance import quantile_bias
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.metrics import routing_metrics
from moe_jax.moe.options import (
  BalanceFraction,
  BalanceScope,
  BalanceSource,
  BiasUpdate,
  Importance,
)
from moe_jax.moe.placement import Placement
from moe_jax.moe.registry import SelectView


@dataclasses.dataclass(frozen=True)
class Call:
  """One call of `route`, as the stages after score see it.

  Attributes:
    view: what the selection saw, noise included.
    config: the router.
    logits: (G, S, E') float32 without noise.
    noise_std: (G, S, E') float32 of normal noise, or None.
    global_load: (num_load_fractions,) or None.
  """

  view: SelectView
  config: RoutingConfig
  logits: jax.Array
  noise_std: jax.Array | None
  global_load: jax.Array | None

  @property
  def probs(self) -> jax.Array:
    """(G, S, E) float32: P of the balance loss, null experts left out."""
    probs = scores.probabilities(self.view.scores, self.config)
    return probs[..., : self.config.num_experts]


@dataclasses.dataclass(frozen=True)
class Asks:
  """Assignments counted by token and expert, all (G, S, E) float32, 0 for padding.

  Attributes:
    asked: 1 where the token asked for the expert at first.
    kept: 1 where it has a slot of the expert in the end.
    first_asked, first_kept: the same for first choices alone.
    weight: the combine weights before drops.
  """

  asked: jax.Array
  kept: jax.Array
  first_asked: jax.Array
  first_kept: jax.Array
  weight: jax.Array

  def counted(self, config: RoutingConfig) -> jax.Array:
    """Returns what the balance loss counts in f."""
    if config.balance_fraction == BalanceFraction.FIRST_CHOICE:
      dispatched = config.balance_source == BalanceSource.DISPATCH
      return self.first_kept if dispatched else self.first_asked
    return self.all_choices(config)

  def all_choices(self, config: RoutingConfig) -> jax.Array:
    """Returns what the communication loss counts."""
    return self.kept if config.balance_source == BalanceSource.DISPATCH else self.asked


def asks_of_tokens(
  expert_GSK: jax.Array,
  asked_GSK: jax.Array,
  placed: Placement,
  weight_GSK: jax.Array,
  num_experts: int,
) -> Asks:
  """Counts token choices; `expert` and `weight` are those asked for at first."""
  at_first, in_the_end = (jax.nn.one_hot(e, num_experts) for e in (expert_GSK, placed.expert))
  asked, kept = at_first * asked_GSK[..., None], in_the_end * placed.kept[..., None]
  return Asks(
    asked=jnp.sum(asked, axis=2),
    kept=jnp.sum(kept, axis=2),
    first_asked=asked[:, :, 0],
    first_kept=kept[:, :, 0],
    weight=jnp.sum(asked * weight_GSK[..., None], axis=2),
  )


def asks_of_experts(
  token_GEC: jax.Array, taken_GEC: jax.Array, weight_GEC: jax.Array, num_tokens: int
) -> Asks:
  """Counts expert choices, where what is asked for is also kept."""
  G, E, _ = token_GEC.shape
  group, expert = jnp.arange(G)[:, None, None], jnp.arange(E)[None, :, None]
  empty = jnp.zeros((G, num_tokens, E), jnp.float32)
  kept = empty.at[group, token_GEC, expert].add(taken_GEC.astype(jnp.float32))
  weight = empty.at[group, token_GEC, expert].add(jnp.where(taken_GEC, weight_GEC, 0.0))
  return Asks(kept, kept, kept, kept, weight)


def losses_of(call: Call, asks: Asks) -> dict[str, jax.Array]:
  """Returns the losses of `moe_jax.moe.losses` by name, not yet multiplied by coefficients.

  `load` is there only where normal noise was drawn, the losses over devices where they count.
  """
  config, view, given = call.config, call.view, call.global_load
  load = None if given is None else given[: config.num_experts]
  probs, counted, more = call.probs, asks.counted(config), {"segment_ids": view.segment_ids}
  values = {
    "load_balance": losses.load_balance_loss(
      probs, counted, view.mask, config, global_load=load, **more
    ),
    "router_z": losses.router_z_loss(call.logits, view.mask, config.loss_padding),
    "importance": losses.importance_loss(_importance(call, asks), view.mask, config),
  }
  if config.load_loss_weight and call.noise_std is not None:
    values["load"] = losses.load_loss(call.logits, view.logits, call.noise_std, view.mask, config)
  if config.device_loss_weight:
    values["device_balance"] = device_losses.device_balance_loss(
      probs, counted, view.mask, config, global_load=load, **more
    )
  if config.communication_loss_weight:
    sent = None if given is None else given[config.num_experts :]
    values["communication"] = device_losses.communication_loss(
      probs, asks.all_choices(config), view.mask, config, global_load=sent, **more
    )
  return values


def _importance(call: Call, asks: Asks) -> jax.Array:
  if call.config.importance == Importance.WEIGHTS:
    return asks.weight
  clean = scores.score_logits(call.logits, call.config)[..., : call.config.num_experts]
  return clean * call.view.mask[..., None]


def metrics_of(call: Call, asks: Asks) -> dict[str, jax.Array]:
  """Returns the metrics of `moe_jax.moe.metrics`, and what balancing over a step collects.

  `balance_load` (num_load_fractions,): f of the call, with `balance_scope = global_batch`.
  `bias_target` (E,): see `quantile_bias`, in training with `bias_update = quantile`.
  """
  view, config = call.view, call.config
  metrics = routing_metrics(call.probs, asks.asked, asks.kept, view.mask, view.capacity, config)
  if config.balance_scope == BalanceScope.GLOBAL_BATCH:
    metrics["balance_load"] = _load_fractions(asks, view.mask, config)
  if config.bias_update == BiasUpdate.QUANTILE and view.train:
    asked = metrics["assignments"]
    metrics["bias_target"] = quantile_bias(view.scores, view.ranking, view.mask, asked, config)
  return metrics


def _load_fractions(asks: Asks, mask: jax.Array, config: RoutingConfig) -> jax.Array:
  """Returns (num_load_fractions,): f of experts, and of devices where their f is read."""
  f = losses.balance_fraction(asks.counted(config), mask, config)
  if not config.communication_loss_weight:
    return f
  sent = device_losses.device_fraction(asks.all_choices(config), mask, config)
  return jnp.concatenate([f, sent])
