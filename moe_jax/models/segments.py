"""Segments: patterns of blocks, written in words."""

import dataclasses

from moe_jax.choices import nearest
from moe_jax.errors import UserError

# The words of a block, and the field of `ModelConfig` that says what they are.
MIXERS = {
  "attention": "attention",
  "global_attention": "global_attention",
  "latent_attention": "latent_attention",
  "mamba": "mamba",
}
FEED_FORWARDS = {"dense": "mlp", "moe": "moe"}
DEPTH = "depth"
# Blocks are scanned, and yet listed one by one where they are counted, converted and planned.
_MOST_BLOCKS = 10_000


@dataclasses.dataclass(frozen=True)
class Segment:
  """A pattern of blocks, repeated and scanned.

  Attributes:
    pattern: (mixer, feed-forward) of each block, for example (("attention", "dense"),
      ("attention", "moe")), and "depth" as a third word where only some tokens take the block.
    repeats: how many times the pattern occurs; the parameters are stacked on that axis.
  """

  pattern: tuple[tuple[str, ...], ...]
  repeats: int

  @property
  def num_layers(self) -> int:
    """Returns the number of blocks."""
    return len(self.pattern) * self.repeats


def parse_segment(segment) -> Segment:
  """Takes a (pattern, repeats) pair apart; see `ModelConfig.segments`.

  Raises:
    UserError: it is none, is empty, or has an unknown block.
  """
  if not (
    isinstance(segment, (tuple, list))
    and len(segment) == 2
    and isinstance(segment[0], str)
    and type(segment[1]) is int
  ):
    raise UserError(
      f"segment {segment!r} is not a (pattern, repeats) pair such as"
      " ('attention:dense attention:moe', 2)"
    )
  pattern, repeats = segment
  if repeats < 1 or not pattern.split():
    raise UserError(f"segment {segment!r} is empty: give at least one block and one repeat")
  if repeats * len(pattern.split()) > _MOST_BLOCKS:
    raise UserError(f"segment {segment!r} has too many blocks: give at most {_MOST_BLOCKS}")
  return Segment(tuple(_parse_block(block) for block in pattern.split()), repeats)


def _parse_block(block: str) -> tuple[str, ...]:
  whole = [f"{mixer}:{kind}" for mixer in MIXERS for kind in FEED_FORWARDS]
  known = whole + [f"{each}:{DEPTH}" for each in whole]
  if block not in known:
    raise UserError(
      f"block {block!r} is not one of {', '.join(whole)}, or one of these and ':{DEPTH}';"
      f" did you mean {nearest(block, known) or known[0]}?"
    )
  return tuple(block.split(":"))
