"""What a Mamba mixer is: its widths, its convolution, and how its scan is computed."""

import dataclasses

from moe_jax.choices import as_choice
from moe_jax.errors import UserError
from moe_jax.layers.attention_config import check_at_least_one, check_positive
from moe_jax.layers.mlp import Activation


@dataclasses.dataclass(frozen=True)
class MambaConfig:
  """A selective state space (Mamba, arXiv 2312.00752) with Jamba's norms (arXiv 2403.19887).

  Attributes:
    inner_dim: I, the channels; the papers take 2 D.
    step_rank: width from which the step sizes of all channels are projected; the papers take
      D / 16, rounded up.
    state_dim: N, the numbers that a channel keeps.
    conv_width: tokens that the convolution reads, the token itself included.
    conv_bias: a bias on the convolution.
    proj_bias: biases on the projections from and to D.
    activation: after the convolution. The gate is always silu.
    norm_epsilon: of the RMSNorms on step sizes, writes and reads.
    scan_chunk: tokens whose states the backward pass computes again at once; it changes time and
      memory, not the result. About the root of the length needs least memory.
  """

  inner_dim: int
  step_rank: int
  state_dim: int = 16
  conv_width: int = 4
  conv_bias: bool = True
  proj_bias: bool = False
  activation: Activation = Activation.SILU
  norm_epsilon: float = 1e-6
  scan_chunk: int = 64

  def __post_init__(self):
    activation = as_choice(Activation, "activation", self.activation)
    object.__setattr__(self, "activation", activation)
    if activation == Activation.SHIFTED_QUICK_GELU:
      raise UserError(
        f"activation = {activation} is refused: it is one of gated networks, and a convolution has"
        " no gate; expected for example silu"
      )
    check_at_least_one(self, "inner_dim", "step_rank", "state_dim", "conv_width", "scan_chunk")
    check_positive(self, "norm_epsilon")
