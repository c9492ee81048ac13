"""The router's parameters, in float32: maps from token to expert logits; and its state."""

import enum

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.parameters import parameter, with_axes
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.options import BiasUpdate, Noise, Projection


class RouterInit(enum.StrEnum):
  """How the columns of the router's kernel, one for each logit, stand to each other at first."""

  NORMAL = "normal"  # drawn independently, truncated normal
  ORTHOGONAL = "orthogonal"  # orthogonal to each other, of the length that `normal` has on average


class RouterState(nnx.Variable):
  """What no gradient reaches: selection bias, adaptive loss scale, table of experts by token id.

  Training updates the first two by rule, and makes the table before its first step.
  """


class Router(nnx.Module):
  """Router logits in float32, matmul included, whatever the activations' dtype; see `Projection`.

  With `dtype` bfloat16 input, kernel and logits are rounded to it, as in a model that has all of
  its arithmetic there (arXiv 2101.03961 Table 2); what is made of the logits stays float32.

  `jitter` multiplies the router's input alone by uniform noise in [1 - jitter, 1 + jitter] in
  training (Switch, arXiv 2101.03961 section 2.4). `init` orthogonal starts experts as far from
  each other as the width allows; `MoEConfig.check_width` tells whether it does.

  Attributes:
    kernel: (D, E') parameter; E' = `config.num_logits`.
    logit_bias: (E') parameter of `projection = affine`, zeros at first. Unlike `bias` it has a
      gradient, and is part of the logits.
    logit_scale: float32 scalar parameter of `projection = normalized`, 1 at first.
    noise_kernel: (D, E') parameter of `noise = learned`, zeros at first (arXiv 1701.06538
      appendix A).
    bias: (E') float32 `RouterState`, the selection bias, if `bias_update` asks for one.
    balance_scale: float32 scalar `RouterState`, the factor of the balance loss's coefficient, if
      `adaptive_target` is set.
    table: (V,) int32 `RouterState`, the expert of each token id, with `selection = table` and a
      `vocab_size`. At first every expert has about as many ids, at random; a run replaces that by
      tables balanced by frequency (`moe_jax.training.tables`).
  """

  def __init__(
    self,
    model_dim: int,
    config: RoutingConfig,
    *,
    key: jax.Array,
    scale: float,
    jitter: float = 0.0,
    init: RouterInit = RouterInit.NORMAL,
    dtype: str = "float32",
    vocab_size: int | None = None,
  ):
    self.jitter, self.dtype = jitter, dtype
    shape, axes = (model_dim, config.num_logits), ("embed", "router")
    if init == RouterInit.ORTHOGONAL:
      orthogonal = jax.nn.initializers.orthogonal(scale**0.5)
      self.kernel = with_axes(orthogonal(key, shape, jnp.float32), axes)
    else:
      self.kernel = parameter(key, shape, axes, fan_in=model_dim, scale=scale)
    self.projection = config.projection
    if config.projection == Projection.AFFINE:
      self.logit_bias = with_axes(jnp.zeros(shape[1:], jnp.float32), ("router",))
    if config.projection == Projection.NORMALIZED:
      self.logit_scale = with_axes(jnp.ones((), jnp.float32), ())
    if config.noise == Noise.LEARNED:
      self.noise_kernel = with_axes(jnp.zeros(shape, jnp.float32), axes)
    if config.bias_update != BiasUpdate.NONE:
      self.bias = RouterState(jnp.zeros(shape[1:], jnp.float32), axes=("router",))
    if config.adaptive_target is not None:
      self.balance_scale = RouterState(jnp.ones((), jnp.float32), axes=())
    if config.selection == "table" and vocab_size is not None:
      shuffled = jax.random.permutation(jax.random.fold_in(key, 1), vocab_size)
      self.table = RouterState(shuffled.astype(jnp.int32) % config.num_experts, axes=("vocab",))

  def __call__(
    self, x: jax.Array, *, key: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array | None]:
    """Maps x (B, L, D) to logits (B, L, E') float32; `key` turns the jitter on.

    Also returns the standard deviation (B, L, E') of learned noise, or None.
    """
    x = x.astype(jnp.float32)
    if self.jitter and key is not None:
      x = x * jax.random.uniform(key, x.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
    noise_std = None
    if hasattr(self, "noise_kernel"):
      # Softplus underflows to 0 for very negative inputs, and the load loss divides by it.
      noise_std = jax.nn.softplus(self._product(x, self.noise_kernel[...])) + 1e-2
    return self._project(x), noise_std

  def _project(self, x: jax.Array) -> jax.Array:
    match self.projection:
      case Projection.AFFINE:
        return self._product(x, self.kernel[...]) + self.logit_bias[...].reshape(1, 1, -1)
      case Projection.NORMALIZED:
        kernel = self.logit_scale[...] * l2_normalize(self.kernel[...], axis=0)
        return self._product(l2_normalize(x, axis=-1), kernel)
      case _:
        return self._product(x, self.kernel[...])

  def _product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    # The default float32 product on TPU runs bfloat16 passes.
    product = jnp.matmul(
      x.astype(self.dtype), kernel.astype(self.dtype), precision=jax.lax.Precision.HIGHEST
    )
    return product.astype(jnp.float32)


def l2_normalize(x: jax.Array, axis: int) -> jax.Array:
  """Divides vectors along an axis by their length sqrt(sum x^2 + 1e-6), in float32.

  The small term is that of the authors' code (google-research/vmoe); it keeps a vector of zeros, as
  padding may be, and its gradient finite.
  """
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True) + 1e-6)
