"""The config section `optimizer`."""

import dataclasses
import enum

from moe_jax.choices import as_choice
from moe_jax.config.bounds import at_least, below
from moe_jax.errors import UserError


class OptimizerName(enum.StrEnum):
  """What turns gradients into updates; see `moe_jax.training.optimizer`."""

  ADAMW = "adamw"  # arXiv 1711.05101: two moments of every parameter
  ADAFACTOR = "adafactor"  # arXiv 1804.04235: a row and a column of second moments of a matrix


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimiser, with linear warm-up and cosine decay.

  Attributes:
    name: see `OptimizerName`.
    learning_rate: the peak; of Adafactor relative to a matrix's root mean square, so that its
      natural size is another than AdamW's: 1e-2 is usual.
    warmup_steps: linear from 0.
    final_fraction: the last learning rate as a fraction of the peak.
    weight_decay: decoupled; not on norms and biases.
    clip_norm: global gradient norm above which gradients are scaled down; 0 = no clipping.
    b1, b2, epsilon: Adam's; Adafactor has no mean of gradients, and a decay of its own.
  """

  name: OptimizerName = OptimizerName.ADAMW
  learning_rate: float = 1e-3
  warmup_steps: int = 100
  final_fraction: float = 0.1
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8

  def __post_init__(self):
    object.__setattr__(self, "name", as_choice(OptimizerName, "name", self.name))
    at_least(
      self,
      0,
      "learning_rate",
      "warmup_steps",
      "final_fraction",
      "weight_decay",
      "clip_norm",
      "b1",
      "b2",
    )
    below(self, 1, "b1", "b2")
    if not 0 < self.epsilon:
      raise UserError(f"epsilon = {self.epsilon} is refused: it must be greater than 0")
    if self.final_fraction > 1:
      raise UserError(f"final_fraction = {self.final_fraction} is refused: it must be at most 1")
    if self.name != OptimizerName.ADAMW:
      self._check_unused("b1", "b2", "epsilon")

  def _check_unused(self, *names: str) -> None:
    for name in names:
      value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
      if value != default:
        raise UserError(
          f"{name} = {value} is refused with name = {self.name}, which does not use it: leave it"
          f" at {default}, or use name = adamw"
        )
