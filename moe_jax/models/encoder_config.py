"""What an encoder-decoder has besides its decoder: another stack, which sees all its tokens."""

import dataclasses

from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """The encoder of `ModelConfig.encoder`; what is not here is as in the decoder.

  Attributes:
    segments: its blocks, as in `ModelConfig.segments`; their mixer is "attention".
    attention: the mixer; its tokens see those after them too.
    start_token: the id that the decoder's sequences begin with, before the first predicted one.
    own_embedding: the encoder has a table of its own instead of the decoder's.
  """

  segments: tuple[tuple[str, int], ...]
  attention: AttentionConfig
  start_token: int = 0
  own_embedding: bool = False

  def __post_init__(self):
    object.__setattr__(self, "segments", tuple(map(tuple, self.segments)))
    attention = self.attention
    for name in ("window", "chunk", "query_temperature_floor"):
      if getattr(attention, name) is not None:
        raise UserError(
          f"encoder.attention.{name} = {getattr(attention, name)} is refused: it looks back, and an"
          " encoder looks both ways; leave it out"
        )
    buckets = attention.relative_bias_buckets
    if buckets is not None and (buckets % 2 or buckets < 4):
      raise UserError(
        f"encoder.attention.relative_bias_buckets = {buckets} is refused: half of them are for keys"
        f" ahead, so it must be even and at least 4, for example {max(4, buckets + buckets % 2)}"
      )
