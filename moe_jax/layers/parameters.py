"""How parameters are born: truncated normal with a scale, and the logical name of every axis."""

import jax
import jax.numpy as jnp
from flax import nnx

# Every name an axis can have; a sharding table maps them to mesh axes.
LOGICAL_AXES = {
  "layers": "repeats of a segment's pattern",
  "vocab": "V",
  "embed": "D",
  "heads": "H, query heads",
  "kv_heads": "key-value heads",
  "head_dim": "width of a head",
  "mlp": "F of a dense feed-forward",
  "expert": "E",
  "expert_embed": "D of an expert",
  "expert_mlp": "F of an expert",
  "router": "E as outputs of the router, which every device needs whole",
  "joined": "several vectors that one matrix projects together",
  "pixels": "numbers of a patch of an image",
  "patches": "patches of an image, and its class token",
  "adapter": "output width of the adapter behind a vision tower",
  "latent": "rank of latent attention's compressed queries, or keys and values; of Mamba's steps",
  "latent_in": "the same rank where latent attention expands it to heads",
  "inner": "I, channels of a Mamba mixer",
  "state": "N, numbers that a channel keeps",
  "selection": "R + 2 N, what a token selects with: step sizes, writes, reads",
  "window": "tokens that a convolution reads",
  "norm": "D of a norm's scale and bias",
  "bias": "outputs of a projection's bias, attention sinks, buckets of a relative bias",
}

# A parameter with no other axes scales or shifts element by element, and enters no product.
_ELEMENTWISE = frozenset({"layers", "norm", "router", "inner", "state"})


def is_elementwise(axes: tuple[str, ...]) -> bool:
  """Tells scales, biases and decays, element by element, from what products read."""
  return _ELEMENTWISE.issuperset(axes)


def parameter(
  key: jax.Array,
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  *,
  fan_in: int,
  scale: float = 1.0,
) -> nnx.Param:
  """Makes a float32 parameter, truncated normal with standard deviation sqrt(scale / fan_in).

  Switch (arXiv 2101.03961 section 2.4) lowers `scale` from 1.0 to 0.1 to stabilise large sparse
  models. The truncation at two standard deviations is corrected for.

  Args:
    key: a random key.
    shape: the parameter's shape.
    axes: one name of `LOGICAL_AXES` an axis.
    fan_in: inputs summed into one output.
    scale: the variance of an output per unit variance of input.
  """
  init = jax.nn.initializers.truncated_normal(stddev=(scale / fan_in) ** 0.5 / 0.87962566103423978)
  return with_axes(init(key, shape, jnp.float32), axes)


def with_axes(value: jax.Array, axes: tuple[str, ...]) -> nnx.Param:
  """Wraps a value as a parameter with named axes."""
  if value.ndim != len(axes):
    raise ValueError(f"{axes} names {len(axes)} axes of a parameter of shape {value.shape}")
  unknown = [name for name in axes if name not in LOGICAL_AXES]
  if unknown:
    raise ValueError(f"{unknown} are not logical axes; known are {', '.join(LOGICAL_AXES)}")
  return nnx.Param(value, axes=axes)


def like(value: jax.Array, x: jax.Array) -> jax.Array:
  """Returns a value in the dtype of x, with axes of size 1 in front up to the rank of x."""
  return value.astype(x.dtype).reshape((1,) * (x.ndim - value.ndim) + value.shape)


def logical_axes(state: nnx.State) -> nnx.State:
  """Returns the tree of axis names, parallel to the parameters of `state`."""
  return jax.tree.map(
    lambda p: p.get_metadata()["axes"], state, is_leaf=lambda p: isinstance(p, nnx.Variable)
  )
