"""What combine weights add up to: the scale at which copies of one network come out."""

import math

from moe_jax.errors import UserError
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import Score, Weighting, WeightOn
from moe_jax.moe.registry import Chooser

_NORMALIZED = (
  Weighting.RENORMALIZED,
  Weighting.RENORMALIZED_AFTER_DROP,
  Weighting.SOFTMAX_SELECTED,
)
_CONSTANT = (Weighting.HARD, Weighting.STRAIGHT_THROUGH)


def weight_total(routing: RoutingConfig) -> float:
  """Returns the sum of a token's combine weights, weight_scale aside, where all logits are equal.

  It is 1 for normalised weights (K^(1 - 1/p) with another norm p) and K for constant ones; K / E
  for the raw scores of a softmax, which arXiv 2410.07524 section 3 makes up for, and K / 2 for
  those of a sigmoid. Raw scores of other tokens have that total only as far as their logits are
  alike. SparseMixer's weights are near 1 each unless logits are within 2 % of each other, so K too.
  Under expert choice K is the mean number of experts of a token.

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
  K = routing.top_k
  if routing.weighting in _NORMALIZED:
    renormalized = routing.weighting != Weighting.SOFTMAX_SELECTED
    return K ** (1 - 1 / routing.weight_norm_order) if renormalized else 1.0
  if routing.weighting in (*_CONSTANT, Weighting.SPARSEMIXER):
    return float(K)
  if routing.score == Score.RELU:
    raise UserError(
      f"score = {routing.score} is refused: it is 0 where all logits are 0, so that no scale makes"
      " up for it; use softmax or sigmoid"
    )
  scores = {
    Score.SOFTMAX: 1 / (routing.num_experts + routing.num_null_experts),
    Score.SIGMOID: 1 / 2,
    Score.SQRT_SOFTPLUS: math.sqrt(math.log(2)),
  }
  return K * scores[routing.score]


def has_fixed_total(routing: RoutingConfig) -> bool:
  """Tells whether `weight_total` holds for every token, whatever its logits are."""
  normalized = routing.weighting in _NORMALIZED and routing.weight_norm_order == 1
  asks_all = routing.selection in ("top_k", "sample", "random", "hash", "table")
  return (
    (normalized or routing.weighting in _CONSTANT) and asks_all and not routing.num_null_experts
  )
