"""What a block that processes only some tokens is told: Mixture-of-Depths (arXiv 2404.02258)."""

import dataclasses
import enum
import fractions
import math

from moe_jax.choices import as_choice
from moe_jax.errors import UserError


class DepthScore(enum.StrEnum):
  """What scales the output of a block that a token takes."""

  LINEAR = "linear"  # the router's logit itself (arXiv 2404.02258 Eq. 1)
  SIGMOID = "sigmoid"  # its sigmoid


@dataclasses.dataclass(frozen=True)
class DepthConfig:
  """Blocks marked `:depth` in `ModelConfig.segments`.

  Attributes:
    capacity: the fraction of the tokens of a row that such a block processes in training, above 0
      and up to 1; the paper's best is 0.125 in every other block.
    score: what scales the block's output.
    loss_weight: coefficient of the binary cross-entropy that teaches a router's sign who is among
      its best tokens (section 3.5). With 0 nothing trains the causal choice outside training.
  """

  capacity: float = 0.125
  score: DepthScore = DepthScore.LINEAR
  loss_weight: float = 0.01

  def __post_init__(self):
    object.__setattr__(self, "score", as_choice(DepthScore, "score", self.score))
    if not 0.0 < self.capacity <= 1.0:
      raise UserError(
        f"capacity = {self.capacity} is refused: the fraction of tokens that a depth block"
        " processes must be above 0 and at most 1"
      )
    if not 0.0 <= self.loss_weight < math.inf:
      raise UserError(f"loss_weight = {self.loss_weight} is refused: it must be 0 or greater")

  def slots(self, length: int) -> int:
    """Returns C, the tokens of a row of `length` that a block processes: ceil(capacity * length).

    The fraction is read as the decimal it was written as: 0.07 of 100 is 7, not 8.
    """
    return math.ceil(fractions.Fraction(str(self.capacity)) * length)
