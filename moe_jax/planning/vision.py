"""What a vision tower is and costs, adapter and projection included.

Only images go through it. Its parameters count as active, as the releases count them, and its
FLOPs are told apart, for one token of an image: a token of text costs none of them.
"""

from moe_jax.models import ModelConfig
from moe_jax.planning.sizes import Size, attention_size, feed_forward_size, norm_size


def vision_parameters(config: ModelConfig) -> int:
  """Returns the parameters of the tower; 0 without one."""
  if config.vision is None:
    return 0
  vision, stack = config.vision, config.vision_stack()
  block = _block(config)
  block_norms = 2 * norm_size(stack, stack.model_dim).rest
  embedded = vision.patch_dim + 1 + vision.num_patches + 1
  return (
    embedded * vision.model_dim
    + 2 * norm_size(stack, stack.model_dim).rest
    + vision.num_layers * (block.matrices + block.rest + block_norms)
    + _adapter(config)
  )


def vision_flops_per_image_token(config: ModelConfig) -> float:
  """Returns the tower's forward FLOPs for one token that stands for an image; 0 without one.

  The FLOPs of an image over its `VisionConfig.tokens_per_image` tokens: two for each parameter of a
  matrix and each patch, class token or token that it multiplies, and the products of every patch's
  query with all keys and values.
  """
  if config.vision is None:
    return 0.0
  vision = config.vision
  seen = vision.num_patches + 1
  patches = vision.num_patches * vision.patch_dim * vision.model_dim
  blocks = vision.num_layers * seen * (_block(config).matrices + 2 * seen * vision.model_dim)
  return 2.0 * ((patches + blocks) / vision.tokens_per_image + _adapter(config))


def _block(config: ModelConfig) -> Size:
  """Returns the size of a block without its norms."""
  width = config.vision.model_dim
  parts = (
    attention_size(width, config.vision.attention()),
    feed_forward_size(width, config.vision.feed_forward()),
  )
  return Size(sum(part.matrices for part in parts), sum(part.rest for part in parts))


def _adapter(config: ModelConfig) -> int:
  """Returns the matrices of adapter and projection, which every token goes through."""
  width = config.vision.adapter_dim
  return width * (config.vision.shuffled_dim + width + config.model_dim)
