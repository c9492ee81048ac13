"""The feed-forward network, as one function for dense blocks and for experts."""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.choices import as_choice
from moe_jax.errors import UserError
from moe_jax.layers.dropout import dropout
from moe_jax.layers.parameters import like, parameter, with_axes

# (rows (..., D), weight, bias or None) -> rows (..., D')
Product = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


class Activation(enum.StrEnum):
  """The nonlinearity; gated networks apply it to the gate."""

  RELU = "relu"
  GELU = "gelu"  # the tanh approximation
  GELU_EXACT = "gelu_exact"
  SILU = "silu"
  QUICK_GELU = "quick_gelu"  # x * sigmoid(1.702 x)
  SQUARED_RELU = "squared_relu"  # arXiv 2109.08668
  # gate * sigmoid(1.702 gate), and up + 1 in place of up: gpt-oss's, for gated networks alone.
  SHIFTED_QUICK_GELU = "shifted_quick_gelu"


def _quick_gelu(x: jax.Array) -> jax.Array:
  return x * jax.nn.sigmoid(1.702 * x)


def _squared_relu(x: jax.Array) -> jax.Array:
  return jnp.square(jax.nn.relu(x))


_ACTIVATIONS = {
  Activation.RELU: jax.nn.relu,
  Activation.GELU: jax.nn.gelu,
  Activation.GELU_EXACT: functools.partial(jax.nn.gelu, approximate=False),
  Activation.SILU: jax.nn.silu,
  Activation.QUICK_GELU: _quick_gelu,
  Activation.SQUARED_RELU: _squared_relu,
  Activation.SHIFTED_QUICK_GELU: _quick_gelu,
}


def activation_function(activation: Activation) -> Callable[[jax.Array], jax.Array]:
  """Returns the nonlinearity of that name, applied element by element."""
  return _ACTIVATIONS[activation]


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


def affine(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """Returns x @ weight, plus the bias if there is one."""
  y = jnp.matmul(x, weight)
  return y if bias is None else y + like(bias, y)


def feed_forward(
  x: jax.Array,
  weights: dict[str, jax.Array],
  key: jax.Array | None,
  config: FeedForwardConfig,
  *,
  product: Product = affine,
  last_product: Product = affine,
) -> jax.Array:
  """Applies one network to x (..., D).

  Args:
    x: (..., D), any float dtype; products are in it.
    weights: `up` (D, F), `down` (F, D) and, if gated, `gate` (D, F), or whatever the products take
      for them; with biases also `up_bias` (F,) and so on.
    key: turns dropout on.
    config: the network.
    product: multiplies rows by `gate` and `up`, and adds the bias.
    last_product: multiplies rows by `down`, and adds the bias.
  """
  w = {name: value.astype(x.dtype) for name, value in weights.items()}
  act = activation_function(config.activation)
  up = product(x, w["up"], w.get("up_bias"))
  if config.gated:
    gate = product(x, w["gate"], w.get("gate_bias"))
    gate, up = _before_activation(gate, up, config)
    hidden = act(gate) * up
  else:
    hidden = act(up)
  return last_product(dropout(hidden, config.dropout, key), w["down"], w.get("down_bias"))


def _before_activation(gate: jax.Array, up: jax.Array, config: FeedForwardConfig):
  if config.clamp is not None:
    gate, up = jnp.minimum(gate, config.clamp), jnp.clip(up, -config.clamp, config.clamp)
  shift = 1 if config.activation == Activation.SHIFTED_QUICK_GELU else 0
  return gate, up + shift if shift else up


def feed_forward_weights(
  key: jax.Array,
  model_dim: int,
  config: FeedForwardConfig,
  scale: float,
  experts: int | None = None,
) -> dict[str, nnx.Param]:
  """Makes the weights of one network, or of `experts` networks stacked on a leading axis.

  Experts' axes are named "expert_embed" and "expert_mlp", so that a table can split them apart from
  those of dense networks.
  """
  names = ("gate", "up", "down") if config.gated else ("up", "down")
  lead_shape, lead_axes, own_axes = (), (), ("embed", "mlp")
  if experts is not None:
    lead_shape, lead_axes, own_axes = (experts,), ("expert",), ("expert_embed", "expert_mlp")
  weights = {}
  for name, name_key in zip(names, jax.random.split(key, len(names)), strict=True):
    shape, axes = (model_dim, config.hidden_dim), own_axes
    if name == "down":
      shape, axes = shape[::-1], axes[::-1]
    weights[name] = parameter(
      name_key, lead_shape + shape, lead_axes + axes, fan_in=shape[0], scale=scale
    )
    if config.bias:
      zeros = jnp.zeros((*lead_shape, shape[1]), jnp.float32)
      weights[f"{name}_bias"] = with_axes(zeros, (*lead_axes, "bias"))
  return weights


class FeedForward(nnx.Module):
  """The dense feed-forward network of a block."""

  def __init__(self, model_dim: int, config: FeedForwardConfig, *, key: jax.Array, scale: float):
    self.config = config
    self.weights = nnx.Dict(feed_forward_weights(key, model_dim, config, scale))

  def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
    """Maps x (B, L, D) to (B, L, D)."""
    return feed_forward(x, {k: v[...] for k, v in self.weights.items()}, key, self.config)
