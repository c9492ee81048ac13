"""The Mamba mixer (arXiv 2312.00752 section 3.4) with Jamba's norms (arXiv 2403.19887).

A token is projected to I channels and to a gate; a short causal convolution and an activation; then
the token itself says how fast each channel's state fades, what is written to it and read from it:
the selective scan. Step sizes, states and the scan are float32 whatever the activations.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.attention_context import Places
from moe_jax.layers.dropout import dropout
from moe_jax.layers.mamba_config import MambaConfig
from moe_jax.layers.mamba_context import MambaContext, mamba_context
from moe_jax.layers.mlp import activation_function, affine
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.parameters import like, parameter, with_axes
from moe_jax.layers.selective_scan import selective_scan

# The step sizes at birth, spread evenly on a logarithmic scale (arXiv 2312.00752 section 3.6).
_STEPS = (1e-3, 1e-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaCache:
  """What one layer keeps of all tokens so far, whatever their number.

  Attributes:
    window: (B, W - 1, I), the last inputs of the convolution; zeros before the first token.
    state: (B, N, I) float32.
  """

  window: jax.Array
  state: jax.Array


class Mamba(nnx.Module):
  """A selective state space between two projections.

  Attributes:
    input, gate, input_bias, gate_bias: (D, I) each and (I,) each, the latter with `proj_bias`.
    kernel, kernel_bias: (W, I), the token itself last, and (I,), the latter with `conv_bias`.
    selection: (I, R + 2 N), to step sizes, writes and reads in this order.
    step_norm, write_norm, read_norm: over R, N and N.
    step, step_bias: (R, I) and (I,).
    log_decay: (I, N); states fade by exp(-step * exp(log_decay)).
    skip: (I,), what of a channel's input passes by its state.
    output, output_bias: (I, D) and (D,), the latter with `proj_bias`.
  """

  def __init__(
    self,
    model_dim: int,
    config: MambaConfig,
    *,
    key: jax.Array,
    scale: float,
    dropout_rate: float = 0.0,
  ):
    self.config = config
    self.dropout_rate = dropout_rate
    c, keys = config, list(jax.random.split(key, 7))

    def matrix(shape, axes):
      return parameter(keys.pop(), shape, axes, fan_in=shape[0], scale=scale)

    self.input = matrix((model_dim, c.inner_dim), ("embed", "inner"))
    self.gate = matrix((model_dim, c.inner_dim), ("embed", "inner"))
    self.kernel = matrix((c.conv_width, c.inner_dim), ("window", "inner"))
    self.selection = matrix((c.inner_dim, c.step_rank + 2 * c.state_dim), ("inner", "selection"))
    self.step = matrix((c.step_rank, c.inner_dim), ("latent", "inner"))
    self.output = matrix((c.inner_dim, model_dim), ("inner", "embed"))
    self.step_norm = RMSNorm(c.step_rank, c.norm_epsilon)
    self.write_norm = RMSNorm(c.state_dim, c.norm_epsilon)
    self.read_norm = RMSNorm(c.state_dim, c.norm_epsilon)
    self._add_vectors(model_dim, keys.pop())

  def _add_vectors(self, model_dim: int, key: jax.Array) -> None:
    """Makes the parameters that are no matrices: biases, the decay and the skip."""
    c, inner = self.config, ("inner",)
    self.step_bias = with_axes(_inverse_softplus(_draw_steps(key, c.inner_dim)), inner)
    # S4D-Real: the state n fades with the rate n + 1 (arXiv 2312.00752 section 3.6).
    rates = jnp.broadcast_to(jnp.arange(1, c.state_dim + 1), (c.inner_dim, c.state_dim))
    self.log_decay = with_axes(jnp.log(rates.astype(jnp.float32)), ("inner", "state"))
    self.skip = with_axes(jnp.ones((c.inner_dim,), jnp.float32), inner)
    if c.conv_bias:
      self.kernel_bias = with_axes(jnp.zeros((c.inner_dim,), jnp.float32), ("bias",))
    if c.proj_bias:
      self.input_bias = with_axes(jnp.zeros((c.inner_dim,), jnp.float32), ("bias",))
      self.gate_bias = with_axes(jnp.zeros((c.inner_dim,), jnp.float32), ("bias",))
      self.output_bias = with_axes(jnp.zeros((model_dim,), jnp.float32), ("bias",))

  @staticmethod
  def context(config: MambaConfig, places: Places) -> MambaContext:
    """Returns what the layers of this config share in a call."""
    return mamba_context(places, config.conv_width)

  @staticmethod
  def empty_cache(
    config: MambaConfig, slots: tuple[int, ...], dtype: jax.typing.DTypeLike
  ) -> MambaCache:
    """Returns a cache of zeros for `slots` (..., B, M); its size does not depend on M."""
    c, rows = config, slots[:-1]
    return MambaCache(
      jnp.zeros((*rows, c.conv_width - 1, c.inner_dim), dtype),
      jnp.zeros((*rows, c.state_dim, c.inner_dim), jnp.float32),
    )

  def __call__(
    self,
    x: jax.Array,
    context: MambaContext,
    cache: MambaCache | None = None,
    *,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, MambaCache | None]:
    """Maps x (B, L, D) to (B, L, D), and the cache to the one after these tokens."""
    before = self.empty_cache(self.config, x.shape[:2], x.dtype) if cache is None else cache
    # Padding is zeroed before the projection and after the convolution, as in the original.
    x = jnp.where(context.mask[:, :, None], x, 0)
    inner, gate = self._project(x, "input"), self._project(x, "gate")
    inner_BWI = jnp.concatenate([before.window.astype(x.dtype), inner], axis=1)
    inner = activation_function(self.config.activation)(self._convolve(inner_BWI, context))
    inner = jnp.where(context.mask[:, :, None], inner, 0)
    y, state = self._scan(inner, context, before.state)
    out = affine(
      (y * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype),
      self.output[...].astype(x.dtype),
      self.output_bias[...].astype(x.dtype) if self.config.proj_bias else None,
    )
    if cache is not None:
      window = _rows(inner_BWI, context.last).astype(cache.window.dtype)
      cache = MambaCache(window, state)
    return dropout(out, self.dropout_rate, key), cache

  def _project(self, x: jax.Array, name: str) -> jax.Array:
    bias = getattr(self, f"{name}_bias")[...].astype(x.dtype) if self.config.proj_bias else None
    return affine(x, getattr(self, name)[...].astype(x.dtype), bias)

  def _convolve(self, inner_BWI: jax.Array, context: MambaContext) -> jax.Array:
    """Returns the causal convolution (B, L, I) of the call's tokens behind a window."""
    W, L = self.config.conv_width, context.mask.shape[1]
    kernel_WI = self.kernel[...].astype(inner_BWI.dtype)

    def shifted(inner_BWI, back):
      return jax.lax.slice_in_dim(inner_BWI, W - 1 - back, W - 1 - back + L, axis=1)

    def looked_up(inner_BWI, back):
      return _rows(inner_BWI, context.sources[:, :, back - 1])

    def earlier(inner_BWI, read):
      total = like(kernel_WI[W - 1], inner_BWI) * shifted(inner_BWI, 0)
      for back in range(1, W):
        taken = jnp.where(context.same[:, :, back - 1, None], read(inner_BWI, back), 0)
        total += like(kernel_WI[W - 1 - back], inner_BWI) * taken
      return total

    # Reading by place is slower, in the backward pass above all, and padding inside a row is rare.
    y = jax.lax.cond(
      context.adjacent,
      lambda inner_BWI: earlier(inner_BWI, shifted),
      lambda inner_BWI: earlier(inner_BWI, looked_up),
      inner_BWI,
    )
    return y + like(self.kernel_bias[...], y) if self.config.conv_bias else y

  def _scan(self, inner: jax.Array, context: MambaContext, state_BNI: jax.Array):
    """Returns y (B, L, I) float32 and the state after the call."""
    c = self.config
    selected = jnp.matmul(inner, self.selection[...].astype(inner.dtype))
    step, write, read = jnp.split(selected, [c.step_rank, c.step_rank + c.state_dim], axis=-1)
    step = jnp.matmul(
      self.step_norm(step), self.step[...].astype(inner.dtype), preferred_element_type=jnp.float32
    )
    step = jax.nn.softplus(step + like(self.step_bias[...], step))
    inner32 = inner.astype(jnp.float32)
    y, state_BNI = selective_scan(
      inner32,
      # A step of 0 leaves the state as it is.
      jnp.where(context.mask[:, :, None], step, 0.0),
      -jnp.exp(self.log_decay[...].astype(jnp.float32)).T,
      self.write_norm(write).astype(jnp.float32),
      self.read_norm(read).astype(jnp.float32),
      starts_BL=context.starts,
      state_BNI=state_BNI,
      chunk=c.scan_chunk,
    )
    return y + like(self.skip[...], inner32) * inner32, state_BNI


def _rows(a_BWI: jax.Array, index: jax.Array) -> jax.Array:
  """Returns rows of a (B, ., I) at an index (B, n), (B, n, I)."""
  return jnp.take_along_axis(a_BWI, index[:, :, None], axis=1, mode="clip")


def _draw_steps(key: jax.Array, count: int) -> jax.Array:
  low, high = (math.log(step) for step in _STEPS)
  return jnp.exp(jax.random.uniform(key, (count,), jnp.float32, low, high))


def _inverse_softplus(y: jax.Array) -> jax.Array:
  return y + jnp.log(-jnp.expm1(-y))
