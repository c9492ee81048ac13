"""What a vision tower is."""

import dataclasses

from moe_jax.errors import UserError
from moe_jax.layers.attention_config import (
  AttentionConfig,
  RotaryLayout,
  check_at_least_one,
  check_positive,
)
from moe_jax.layers.mlp import Activation, FeedForwardConfig


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """The tower that makes tokens of images, Llama 4's; the defaults of sizes are its release's.

  Attributes:
    image_token: the id whose embeddings the tower's output takes the place of.
    model_dim: width of the tower.
    num_layers: its blocks, attention and a dense feed-forward each, both with biases.
    num_heads: of its attention; a head's width must be a multiple of 4.
    hidden_dim: hidden width of its feed-forwards.
    adapter_dim: hidden and output width of the adapter behind it.
    image_size: rows and columns of an image.
    patch_size: rows and columns of a patch.
    num_channels: of an image.
    pixel_shuffle: rows and columns of patches that one token stands for.
    rope_theta: base of the rotary frequencies, see `moe_jax.models.vision.patch_rotary_table`.
    norm_epsilon: of the layer norms.
  """

  image_token: int
  model_dim: int = 1408
  num_layers: int = 34
  num_heads: int = 16
  hidden_dim: int = 5632
  adapter_dim: int = 4096
  image_size: int = 336
  patch_size: int = 14
  num_channels: int = 3
  pixel_shuffle: int = 2
  rope_theta: float = 10_000.0
  norm_epsilon: float = 1e-5

  def __post_init__(self):
    fields = [field.name for field in dataclasses.fields(self) if field.type is int]
    check_at_least_one(self, *(name for name in fields if name != "image_token"))
    check_positive(self, "rope_theta", "norm_epsilon")
    if self.model_dim % (4 * self.num_heads):
      raise UserError(
        f"num_heads = {self.num_heads} with model_dim = {self.model_dim} is refused: rows and"
        " columns rotate pairs in half of a head each, so 4 * num_heads must divide model_dim"
      )
    cell = self.patch_size * self.pixel_shuffle
    if self.image_size % cell:
      nearest = max(1, round(self.image_size / cell)) * cell
      raise UserError(
        f"image_size = {self.image_size} is refused: it must be a multiple of patch_size *"
        f" pixel_shuffle = {cell}, for example {nearest}"
      )

  @property
  def patches_per_side(self) -> int:
    """Returns the rows, and the columns, of an image's patches."""
    return self.image_size // self.patch_size

  @property
  def num_patches(self) -> int:
    """Returns the patches of an image."""
    return self.patches_per_side**2

  @property
  def tokens_per_image(self) -> int:
    """Returns the tokens that stand for an image in a text."""
    return self.num_patches // self.pixel_shuffle**2

  @property
  def patch_dim(self) -> int:
    """Returns the numbers of one patch."""
    return self.num_channels * self.patch_size**2

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Returns (channels, rows, columns) of an image."""
    return self.num_channels, self.image_size, self.image_size

  @property
  def shuffled_dim(self) -> int:
    """Returns the width of the patches that become one token, side by side."""
    return self.model_dim * self.pixel_shuffle**2

  def attention(self) -> AttentionConfig:
    """Returns the attention of a block; the tower gives it the angles of rows and columns."""
    return AttentionConfig(
      self.num_heads,
      self.num_heads,
      self.model_dim // self.num_heads,
      rope_theta=self.rope_theta,
      rotary_layout=RotaryLayout.PAIRS,
      qkv_bias=True,
      out_bias=True,
    )

  def feed_forward(self) -> FeedForwardConfig:
    """Returns the feed-forward of a block."""
    return FeedForwardConfig(self.hidden_dim, activation=Activation.GELU_EXACT, bias=True)
