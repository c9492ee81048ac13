"""The vision tower of Llama 4 (released code; no report): images to tokens of a text."""

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.layers.attention_context import AttentionContext
from moe_jax.layers.mlp import Activation, activation_function
from moe_jax.layers.norms import make_norm
from moe_jax.layers.parameters import like, parameter
from moe_jax.layers.rotary import RotaryTable
from moe_jax.models.config import ModelConfig
from moe_jax.models.stack import Stack
from moe_jax.models.vision_config import VisionConfig
from moe_jax.moe.layer import TokenInfo


class VisionTower(Stack):
  """Patches through bidirectional blocks, an adapter and a projection to the text's width.

  An image's row of tokens is its patches, row by row, and the class token behind them, which is
  dropped after the last block: it only lets patches share what none of them holds.

  Attributes:
    patch_embedding: (numbers of a patch, W), W the tower's width.
    class_embedding: (W,).
    position_embedding: (patches + 1, W), the class token's last.
    first_norm: before the first block; `final_norm` is behind the last.
    adapter_in, adapter_out: (W of `pixel_shuffle`^2 patches, A) and (A, A).
    projection: (A, D) to the text's width.
  """

  def __init__(self, config: ModelConfig, *, key: jax.Array):
    vision, stack = config.vision, config.vision_stack()
    stack_key, *keys = jax.random.split(key, 7)
    super().__init__(stack, key=stack_key)
    self.vision = vision
    W, A = vision.model_dim, vision.adapter_dim
    patch, shuffled = vision.patch_dim, vision.shuffled_dim
    self.patch_embedding = parameter(keys[0], (patch, W), ("pixels", "embed"), fan_in=patch)
    self.class_embedding = parameter(keys[1], (W,), ("embed",), fan_in=W)
    positions = (vision.num_patches + 1, W)
    self.position_embedding = parameter(keys[2], positions, ("patches", "embed"), fan_in=W)
    self.first_norm = make_norm(stack.norm, W, vision.norm_epsilon)
    self.adapter_in = parameter(keys[3], (shuffled, A), ("joined", "mlp"), fan_in=shuffled)
    self.adapter_out = parameter(keys[4], (A, A), ("mlp", "adapter"), fan_in=A)
    self.projection = parameter(keys[5], (A, config.model_dim), ("adapter", "embed"), fan_in=A)

  def __call__(self, pixel_values: jax.Array) -> jax.Array:
    """Maps images (N, channels, rows, columns) to tokens (N, T, D), T = `tokens_per_image`."""
    x = self._embed(pixel_values.astype(self.config.dtype))
    N, P, _ = x.shape
    mask = jnp.ones((N, P), bool)
    contexts = {
      "attention": AttentionContext(
        patch_rotary_table(self.vision), jnp.broadcast_to(mask[:, None, :], (N, P, P))
      )
    }
    x, _, _ = self.run(
      self.first_norm(x), contexts, TokenInfo(mask), None, keys=[None], train=False
    )
    x = pixel_shuffle(self.finish(x)[:, :-1], self.vision.pixel_shuffle)
    gelu = activation_function(Activation.GELU_EXACT)
    for weight in (self.adapter_in, self.adapter_out):
      x = gelu(jnp.matmul(x, weight[...].astype(x.dtype)))
    return jnp.matmul(x, self.projection[...].astype(x.dtype))

  def _embed(self, pixels: jax.Array) -> jax.Array:
    """Returns patches and class token with their positions, (N, patches + 1, W)."""
    patches = cut_patches(pixels, self.vision.patch_size)
    x = jnp.matmul(patches, self.patch_embedding[...].astype(patches.dtype))
    last = jnp.broadcast_to(like(self.class_embedding[...], x), (x.shape[0], 1, x.shape[2]))
    return jnp.concatenate([x, last], axis=1) + like(self.position_embedding[...], x)


def cut_patches(pixels: jax.Array, size: int) -> jax.Array:
  """Maps images (N, C, rows, columns) to patches (N, P, C * size^2), row by row.

  A patch's numbers are in the order of (channel, row, column).
  """
  N, C, rows, columns = pixels.shape
  cut = pixels.reshape(N, C, rows // size, size, columns // size, size)
  return cut.transpose(0, 2, 4, 1, 3, 5).reshape(N, -1, C * size * size)


def pixel_shuffle(x: jax.Array, size: int) -> jax.Array:
  """Joins squares of size^2 patches: (N, P, W) to (N, P / size^2, size^2 * W), row by row.

  The patches of a square stand side by side, row by row too (Pixel shuffle, arXiv 1609.05158,
  turned round).
  """
  N, P, W = x.shape
  side = round(P**0.5)
  cut = x.reshape(N, side // size, size, side // size, size, W)
  return cut.transpose(0, 1, 3, 2, 4, 5).reshape(N, P // size**2, size * size * W)


def patch_rotary_table(config: VisionConfig) -> RotaryTable:
  """Returns the cosines and sines of all patches and the class token, (1, P + 1, 1, K / 2).

  The first half of a head's K / 2 pairs turns by (column + 1) * theta^(-4i / K), i counted in the
  half, the second by (row + 1) * theta^(-4i / K). The class token is not turned.
  """
  side, pairs = config.patches_per_side, config.model_dim // config.num_heads // 4
  row, column = jnp.divmod(jnp.arange(side * side), side)
  frequency = config.rope_theta ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
  parts = [(each + 1)[:, None] * frequency[None] for each in (column, row)]
  angle = jnp.concatenate(parts, axis=-1)
  angle = jnp.pad(angle, ((0, 1), (0, 0)))[None, :, None]
  return jnp.cos(angle), jnp.sin(angle)


def image_places(
  config: ModelConfig,
  tokens: jax.Array,
  token_mask: jax.Array,
  pixel_values: jax.Array,
  image_mask: jax.Array | None = None,
) -> jax.Array:
  """Returns which tokens stand for images, (B, L) bool, after checking the images.

  Args:
    config: the model's.
    tokens: (B, L) int32.
    token_mask: (B, L) bool, True = real token.
    pixel_values: (N, channels, rows, columns), the images of all rows in order.
    image_mask: (B, L) bool; None = the real tokens with the id `VisionConfig.image_token`.

  Raises:
    UserError: a model without a tower, images of another shape, or another number of tokens than
      the images have; the number is unknown, and not checked, inside a compiled function.
  """
  vision = config.vision
  if vision is None:
    raise UserError(
      "pixel_values were given, but the model's config has no vision section: leave them out"
    )
  shape, dtype = pixel_values.shape, pixel_values.dtype
  if shape[1:] != vision.image_shape or not jnp.issubdtype(dtype, jnp.floating):
    raise UserError(
      f"pixel_values have shape {shape} and dtype {dtype}; expected (images,"
      f" {', '.join(map(str, vision.image_shape))}) floats"
    )
  if image_mask is None:
    image_mask = token_mask & (tokens == vision.image_token)
  elif image_mask.shape != tokens.shape or image_mask.dtype != bool:
    raise UserError(
      f"image_mask has shape {image_mask.shape} and dtype {image_mask.dtype}; expected"
      f" {tokens.shape} and bool, True = token of an image"
    )
  wanted = shape[0] * vision.tokens_per_image
  if not isinstance(image_mask, jax.core.Tracer) and int(image_mask.sum()) != wanted:
    raise UserError(
      f"tokens hold {int(image_mask.sum())} image tokens (id {vision.image_token}); expected"
      f" {wanted}, {vision.tokens_per_image} for each of {shape[0]} images"
    )
  return image_mask


def place_images(x: jax.Array, image_mask: jax.Array, images: jax.Array) -> jax.Array:
  """Returns embeddings x (B, L, D) with the tokens of images (N, T, D) in the masked places.

  They fill the places in order, row after row. Another number of places than tokens makes all of
  x NaN: inside a compiled function nothing can be refused.
  """
  rows = images.reshape(-1, images.shape[-1]).astype(x.dtype)
  order = jnp.cumsum(image_mask.reshape(-1)).reshape(image_mask.shape) - 1
  placed = jnp.where(image_mask[..., None], rows.at[order].get(mode="clip"), x)
  return jnp.where(jnp.sum(image_mask) == rows.shape[0], placed, jnp.nan)
