"""Capacity: how many slots an expert has."""

import fractions
import math

from moe_jax.errors import UserError
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import CapacityConvention, Overflow, Rounding
from moe_jax.moe.registry import Chooser

_ROUND = {Rounding.CEIL: math.ceil, Rounding.FLOOR: math.floor, Rounding.ROUND_HALF_EVEN: round}


def expert_capacity(config: RoutingConfig, num_tokens: int, *, train: bool) -> int:
  """Returns C, the slots of one expert in a group of `num_tokens` = S tokens.

  `per_token`: CF * S / E (Switch, arXiv 2101.03961 Eq. 3); `per_assignment`: CF * K * S / E
  (GShard, arXiv 2006.16668 section 2.2, where CF = 1 and K = 2 give 2S/E). CF is read as the
  decimal it was written as: 1.1 * 100 / 10 is 11 slots, not ceil(11.000000000000002). Padding
  tokens count in S, so that C is static. Dropless routing has C = S: a token asks for an expert at
  most once.

  Raises:
    UserError: dropless routing with a given capacity below S, which would have to drop.
  """
  if config.overflow == Overflow.DROPLESS:
    if config.capacity is not None and config.capacity < num_tokens:
      raise UserError(
        f"capacity = {config.capacity} contradicts overflow = dropless for groups of {num_tokens}"
        f" tokens: set overflow = drop to use it, or capacity = None"
      )
    return num_tokens
  if config.selector.chooser == Chooser.SLOT:
    # A slot that mixes tokens is of use beyond one a token.
    return config.capacity
  if config.capacity is not None:
    return min(config.capacity, num_tokens)
  factor = config.capacity_factor if train else config.eval_capacity_factor
  slots = max(
    _asked_slots(fractions.Fraction(str(factor)), num_tokens, config), config.min_capacity
  )
  slots = -(-slots // config.capacity_multiple) * config.capacity_multiple
  return min(slots, num_tokens)


def _asked_slots(factor: fractions.Fraction, num_tokens: int, config: RoutingConfig) -> int:
  """Returns the slots that the factor asks for, rounded by the config's rule."""
  per_token = config.capacity_convention == CapacityConvention.PER_TOKEN
  choices, E = 1 if per_token else config.top_k, config.num_experts
  match config.capacity_rounding:
    case Rounding.FLOOR_OF_CEILED_ASSIGNMENTS:
      return math.floor(factor * -(-choices * num_tokens // E))
    case Rounding.FLOOR_OF_CEILED_TOKENS:
      return choices * math.floor(factor * -(-num_tokens // E))
    case rounding:
      return _ROUND[rounding](factor * choices * num_tokens / E)
