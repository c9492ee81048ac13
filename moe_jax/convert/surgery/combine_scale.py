"""What combine weights add up to: the scale at which copies of one network come out."""

import dataclasses

import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import Overflow, Weighting, WeightOn
from moe_jax.moe.registry import Chooser
from moe_jax.moe.routing import route

_NORMALIZED = (
  Weighting.RENORMALIZED,
  Weighting.RENORMALIZED_AFTER_DROP,
  Weighting.SOFTMAX_SELECTED,
)
_CONSTANT = (Weighting.HARD, Weighting.STRAIGHT_THROUGH)


def weight_total(routing: RoutingConfig) -> float:
  """Returns the sum of a token's combine weights, weight_scale aside, where all logits are equal.

  It is 1 for normalised weights, K for constant ones; K / E for the raw scores of a softmax, which
  arXiv 2410.07524 section 3 divides by, and K / 2 for those of a sigmoid. For raw scores it is
  the total of other tokens only as far as their logits are small.

  Raises:
    UserError: a router to which the question does not apply.
  """
  if routing.selector.chooser == Chooser.SLOT or routing.weight_on == WeightOn.INPUT:
    name = "weight_on" if routing.weight_on == WeightOn.INPUT else "selection"
    raise UserError(
      f"{name} = {getattr(routing, name)} is refused: its experts do not see the tokens themselves,"
      " so that copies of a dense network cannot stand for it; use weight_on = output and a"
      " selection such as top_k"
    )
  if routing.selector.chooser == Chooser.EXPERT:
    # As many experts a token, on average.
    routing = dataclasses.replace(routing, selection="top_k")
  routing = dataclasses.replace(
    routing, overflow=Overflow.DROPLESS, capacity=None, weight_scale=1.0, bias_update="none"
  )
  ids = jnp.zeros((1, 1), jnp.int32)
  plan = route(jnp.zeros((1, 1, routing.num_logits)), routing, token_ids=ids, segment_ids=ids)
  total = float(jnp.sum(plan.weight))
  if not total > 0:
    raise UserError(
      f"score = {routing.score} is refused: it is 0 where all logits are equal, so that no scale"
      " makes up for it; use softmax or sigmoid"
    )
  return total


def has_fixed_total(routing: RoutingConfig) -> bool:
  """Tells whether `weight_total` holds for every token, whatever its logits are."""
  normalized = routing.weighting in _NORMALIZED and routing.weight_norm_order == 1
  asks_all = routing.selection in ("top_k", "sample", "random", "hash", "table")
  return (
    (normalized or routing.weighting in _CONSTANT) and asks_all and not routing.num_null_experts
  )
