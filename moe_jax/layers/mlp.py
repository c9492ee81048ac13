"""The feed-forward network, as one function for dense blocks and for experts."""

import dataclasses
import enum
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.choices import as_choice
from moe_jax.errors import UserError
from moe_jax.layers.dropout import dropout
from moe_jax.layers.parameters import parameter

# (rows (..., D), weight) -> rows (..., D')
Product = Callable[[jax.Array, jax.Array], jax.Array]


class Activation(enum.StrEnum):
  """The nonlinearity; gated networks apply it to the gate."""

  RELU = "relu"
  GELU = "gelu"  # the tanh approximation
  GELU_EXACT = "gelu_exact"
  SILU = "silu"
  # gate * sigmoid(1.702 gate), and up + 1 in place of up: gpt-oss's, for gated networks alone.
  SHIFTED_QUICK_GELU = "shifted_quick_gelu"


_ACTIVATIONS = {
  Activation.RELU: jax.nn.relu,
  Activation.GELU: jax.nn.gelu,
  Activation.SILU: jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
  """A feed-forward network D -> F -> D.

  Attributes:
    hidden_dim: F.
    gated: act(x W_gate) * (x W_up) W_down (arXiv 2002.05202) instead of act(x W_up) W_down.
    activation: the nonlinearity.
    dropout: rate on the hidden activations in training.
    bias: every product with a matrix has a bias.
    clamp: before the activation, the gate is at most this, and `up` within [-clamp, clamp]
      (gpt-oss: 7); gated networks alone. None = not.
  """

  hidden_dim: int
  gated: bool = False
  activation: Activation = Activation.RELU
  dropout: float = 0.0
  bias: bool = False
  clamp: float | None = None

  def __post_init__(self):
    activation = as_choice(Activation, "activation", self.activation)
    object.__setattr__(self, "activation", activation)
    if self.hidden_dim < 1:
      raise UserError(f"hidden_dim = {self.hidden_dim} is refused: it must be at least 1")
    if not 0.0 <= self.dropout < 1.0:
      raise UserError(f"dropout = {self.dropout} is refused: it must be in [0, 1)")
    if self.clamp is not None and not 0 < self.clamp < math.inf:
      raise UserError(f"clamp = {self.clamp} is refused: it must be greater than 0")
    if not self.gated:
      self._check_plain()

  def _check_plain(self) -> None:
    if self.clamp is not None:
      raise UserError(f"clamp = {self.clamp} is refused: it is of a gate; use gated = true")
    if self.activation == Activation.SHIFTED_QUICK_GELU:
      raise UserError(
        f"activation = {self.activation} is refused: it is of a gate; use gated = true, or gelu"
      )

  @property
  def num_matrices(self) -> int:
    """Returns the number of weight matrices: 3 gated, 2 plain."""
    return 3 if self.gated else 2


def feed_forward(
  x: jax.Array,
  weights: dict[str, jax.Array],
  key: jax.Array | None,
  config: FeedForwardConfig,
  *,
  product: Product = jnp.matmul,
  last_product: Product = jnp.matmul,
) -> jax.Array:
  """Applies one network to x (..., D); `weights` has `up`, `down` and, if gated, `gate`.

  Args:
    x: (..., D), any float dtype; products are in it.
    weights: the matrices, or whatever the products take for them.
    key: turns dropout on.
    config: the network.
    product: multiplies rows by `gate` and `up`.
    last_product: multiplies rows by `down`.
  """
  w = {name: value.astype(x.dtype) for name, value in weights.items()}
  act = _ACTIVATIONS[config.activation]
  if config.gated:
    hidden = act(product(x, w["gate"])) * product(x, w["up"])
  else:
    hidden = act(product(x, w["up"]))
  return last_product(dropout(hidden, config.dropout, key), w["down"])


def feed_forward_weights(
  key: jax.Array,
  model_dim: int,
  config: FeedForwardConfig,
  scale: float,
  experts: int | None = None,
) -> dict[str, nnx.Param]:
  """Makes the weights of one network, or of `experts` networks stacked on a leading axis.

  The hidden axis is named "expert_mlp" in experts, so that a table can shard it apart from "mlp".
  """
  names = ("gate", "up", "down") if config.gated else ("up", "down")
  lead_shape, lead_axes, hidden = (
    ((), (), "mlp") if experts is None else ((experts,), ("expert",), "expert_mlp")
  )
  weights = {}
  for name, name_key in zip(names, jax.random.split(key, len(names)), strict=True):
    shape, axes = (model_dim, config.hidden_dim), ("embed", hidden)
    if name == "down":
      shape, axes = shape[::-1], axes[::-1]
    weights[name] = parameter(
      name_key, lead_shape + shape, lead_axes + axes, fan_in=shape[0], scale=scale
    )
  return weights


class FeedForward(nnx.Module):
  """The dense feed-forward network of a block."""

  def __init__(self, model_dim: int, config: FeedForwardConfig, *, key: jax.Array, scale: float):
    self.config = config
    self.weights = nnx.Dict(feed_forward_weights(key, model_dim, config, scale))

  def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
    """Maps x (B, L, D) to (B, L, D)."""
    return feed_forward(x, {k: v[...] for k, v in self.weights.items()}, key, self.config)
