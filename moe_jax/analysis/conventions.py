"""What routers' conventions are, in words, and what a difference between two of them changes."""

import dataclasses
import functools

import jax
import numpy as np

from moe_jax.analysis.routed_sample import by_row, draw_sample, presence, route_rows
from moe_jax.analysis.routing_words import shown_fields
from moe_jax.errors import UserError
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.losses import loss_weights
from moe_jax.moe.options import BalanceFraction, Overflow
from moe_jax.moe.presets import preset
from moe_jax.moe.registry import Chooser

SAMPLE_SHAPE = (8, 128)
SAMPLE_EXPERTS = 16


@dataclasses.dataclass(frozen=True)
class Difference:
  """A field in which two routers differ.

  Attributes:
    field: its name.
    meaning: what it decides, in words.
    values: of the first and of the second router; "unused" where the router never reads it.
  """

  field: str
  meaning: str
  values: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class SampleOutcome:
  """What one router did with the sample.

  Attributes:
    capacity: C, slots per expert and group.
    num_groups: G.
    dropped: share of the assignments asked for that got no slot.
    experts_per_token: mean number of experts that see a token.
    balance_loss: before its coefficient; None if the router has none.
    balance_at_uniform: its value where all experts get alike.
    balance_weight: its coefficient.
  """

  capacity: int
  num_groups: int
  dropped: float
  experts_per_token: float
  balance_loss: float | None
  balance_at_uniform: int
  balance_weight: float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two routers on the same logits.

  Attributes:
    configs: both routers at the sample's size.
    outcomes: what each did.
    asked_differently: share of tokens that ask different sets of experts, before drops.
    seen_differently: share of tokens that different sets of experts see in the end.
    dropped_differently: share of tokens that lose another number of assignments.
  """

  configs: tuple[RoutingConfig, RoutingConfig]
  outcomes: tuple[SampleOutcome, SampleOutcome]
  asked_differently: float
  seen_differently: float
  dropped_differently: float


def differences(a: RoutingConfig, b: RoutingConfig) -> list[Difference]:
  """Returns the fields in which two routers differ, those that neither reads left out."""
  shown_a, shown_b = shown_fields(a), shown_fields(b)
  return [
    Difference(field, meaning, (value, shown_b[field][1]))
    for field, (meaning, value) in shown_a.items()
    if value != shown_b[field][1]
  ]


def same_size(first: str, second: str, num_experts: int = SAMPLE_EXPERTS):
  """Returns two presets with the same number of experts and, where both can, the same K.

  K is the first preset's if the second accepts it and can be trained with it, else the second's if
  that holds of the first, else each keeps its own.
  """
  own = [preset(name).top_k for name in (first, second)]
  for top_k in own:
    try:
      pair = tuple(preset(name, num_experts=num_experts, top_k=top_k) for name in (first, second))
      for config in pair:
        config.check_trainable()
    except UserError:
      continue
    return pair
  return tuple(preset(name, num_experts=num_experts) for name in (first, second))


def compare(
  a: RoutingConfig, b: RoutingConfig, *, shape: tuple[int, int] = SAMPLE_SHAPE, seed: int = 0
) -> Comparison:
  """Routes one random sample by both, as in training.

  Args:
    a, b: routers with the same number of experts.
    shape: (B, L) of the sample, see `draw_sample`.
    seed: of the sample.
  """
  sample = draw_sample(max(a.num_logits, b.num_logits), shape, seed)
  (one, seen_a, asked_a), (two, seen_b, asked_b) = (_run(sample, config) for config in (a, b))
  lost_a, lost_b = np.sum(asked_a - seen_a, axis=-1), np.sum(asked_b - seen_b, axis=-1)
  return Comparison(
    (a, b),
    (one, two),
    asked_differently=float(np.mean(np.any(asked_a != asked_b, axis=-1))),
    seen_differently=float(np.mean(np.any(seen_a != seen_b, axis=-1))),
    dropped_differently=float(np.mean(lost_a != lost_b)),
  )


def _run(sample, config):
  """Returns the outcome and the experts (B, L, E) that see and that were asked by each token."""
  logits = sample.logits[..., : config.num_logits]
  plan, seen_BLE = jax.device_get(_route(logits, sample.ids, config))
  asked_BLE = seen_BLE
  if config.selector.chooser == Chooser.TOKEN and config.overflow != Overflow.DROPLESS:
    unlimited = dataclasses.replace(config, overflow=Overflow.DROPLESS, capacity=None)
    asked_BLE = jax.device_get(_seen(logits, sample.ids, unlimited))
  return _outcome(plan, config), seen_BLE, asked_BLE


@functools.partial(jax.jit, static_argnames="config")
def _route(logits, ids, config):
  plan = route_rows(logits, ids, config, train=True)
  return plan, by_row(presence(plan), ids.shape)


@functools.partial(jax.jit, static_argnames="config")
def _seen(logits, ids, config):
  return by_row(presence(route_rows(logits, ids, config, train=True)), ids.shape)


def _outcome(plan, config):
  loss = plan.losses.get("load_balance")
  weight = loss_weights(config)["load_balance"]
  sums_to_k = config.balance_fraction == BalanceFraction.ALL_CHOICES
  return SampleOutcome(
    capacity=plan.capacity,
    num_groups=plan.dispatch.shape[0] if hasattr(plan, "dispatch") else plan.token.shape[0],
    dropped=float(plan.metrics["dropped_fraction"]),
    experts_per_token=float(plan.metrics["experts_per_token"]),
    balance_loss=float(loss) if loss is not None and weight else None,
    balance_at_uniform=config.top_k if sums_to_k else 1,
    balance_weight=weight,
  )
