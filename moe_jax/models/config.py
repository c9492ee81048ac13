"""What a model is: widths, and segments of block patterns."""

import dataclasses
import enum

from moe_jax.choices import as_choice, did_you_mean
from moe_jax.errors import UserError
from moe_jax.layers.attention import AttentionConfig
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.models.depth_config import DepthConfig
from moe_jax.moe.dispatch import Dispatch
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.options import Overflow
from moe_jax.moe.registry import Chooser

MIXERS = ("attention",)
FEED_FORWARDS = ("dense", "moe")
DEPTH = "depth"


class Remat(enum.StrEnum):
  """What the backward pass recomputes instead of storing, per repeat of a segment's pattern."""

  NONE = "none"
  FULL = "full"  # everything: least memory, about a third more work
  DOTS = "dots"  # everything but matrix products


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


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only language model.

  Attributes:
    vocab_size: V.
    model_dim: D.
    segments: ((pattern, repeats), ...); a pattern is a string of blocks "mixer:feed_forward", for
      example "attention:dense attention:moe": Switch's alternation. "mixer:feed_forward:depth" is
      a block that takes only some tokens, see `depth`.
    attention: the mixer "attention"; its fields are flattened into the model's level in config
      files.
    mlp: the feed-forward "dense".
    moe: the feed-forward "moe"; None if no block uses it.
    depth: the blocks marked ":depth" (Mixture-of-Depths); None if there is none.
    tie_embeddings: the head is the transposed embedding.
    dropout: rate on the embedding and on the output of every mixer and feed-forward, in training.
    init_scale: of the blocks' matrices, see `moe_jax.layers.parameters.parameter`; Switch uses
      0.1. Embedding and head keep 1.0.
    norm_epsilon: of every RMSNorm.
    dtype: of activations, "float32" or "bfloat16"; parameters and the router stay float32.
    remat: memory for work in the backward pass.
    scan_unroll: repeats of a segment's pattern in one iteration of its scan; more compile time for
      less loop overhead. XLA's CPU backend gains about a fifth on small models.
  """

  vocab_size: int
  model_dim: int
  segments: tuple[tuple[str, int], ...]
  attention: AttentionConfig = dataclasses.field(metadata={"flatten": True})
  mlp: FeedForwardConfig
  moe: MoEConfig | None = None
  depth: DepthConfig | None = None
  tie_embeddings: bool = False
  dropout: float = 0.0
  init_scale: float = 1.0
  norm_epsilon: float = 1e-6
  dtype: str = "float32"
  remat: Remat = Remat.NONE
  scan_unroll: int = 1

  def __post_init__(self):
    object.__setattr__(self, "remat", as_choice(Remat, "remat", self.remat))
    for name in ("vocab_size", "model_dim", "scan_unroll"):
      if getattr(self, name) < 1:
        raise UserError(f"{name} = {getattr(self, name)} is refused: it must be at least 1")
    if self.dtype not in ("float32", "bfloat16"):
      raise UserError(f"dtype = {self.dtype!r} is not one of float32, bfloat16")
    if not 0.0 <= self.dropout < 1.0:
      raise UserError(f"dropout = {self.dropout} is refused: it must be in [0, 1)")
    for name in ("init_scale", "norm_epsilon"):
      if not getattr(self, name) > 0:
        raise UserError(f"{name} = {getattr(self, name)} is refused: it must be greater than 0")
    blocks = [block for segment in self.parsed_segments() for block in segment.pattern]
    kinds = [block[1] for block in blocks]
    if "moe" in kinds and self.moe is None:
      raise UserError(f"segments = {self.segments} has a moe block but moe is None")
    if "moe" not in kinds and self.moe is not None:
      raise UserError(
        f"segments = {self.segments} has no moe block, so moe would be ignored; leave"
        " moe out, or use for example 'attention:moe'"
      )
    if self.moe is not None:
      self.moe.check_width(self.model_dim)
    if any(DEPTH in block for block in blocks) != (self.depth is not None):
      raise UserError(
        f"segments = {self.segments} and depth = {self.depth} contradict each other: blocks such"
        " as 'attention:dense:depth' need a depth section, and a depth section such blocks"
      )
    if self.moe is not None and any(block[1:] == ("moe", DEPTH) for block in blocks):
      routing = self.moe.routing
      if routing.selection == "hash" and routing.hash_ngram > 1:
        raise UserError(
          f"hash_ngram = {routing.hash_ngram} is refused: it must be 1 in a 'moe:depth' block,"
          " which does not see the tokens it leaves out"
        )
    # JSON gives lists, and a config must be hashable: it is part of what is compiled.
    object.__setattr__(self, "segments", tuple(map(tuple, self.segments)))

  def parsed_segments(self) -> tuple[Segment, ...]:
    """Returns the segments with their patterns taken apart."""
    if not (self.segments and isinstance(self.segments, (tuple, list))):
      raise UserError(
        f"segments = {self.segments!r} is refused: a model needs at least one"
        " (pattern, repeats) pair, for example"
        " (('attention:dense attention:moe', 2),)"
      )
    return tuple(_parse_segment(segment) for segment in self.segments)

  def layers(self) -> list[tuple[str, ...]]:
    """Returns (mixer, feed-forward), and "depth" after them if so, of every block in order."""
    return [block for s in self.parsed_segments() for block in s.pattern * s.repeats]

  def moe_layers(self) -> list[int]:
    """Returns the indices of the blocks with experts."""
    return [i for i, block in enumerate(self.layers()) if block[1] == "moe"]

  def depth_layers(self) -> list[int]:
    """Returns the indices of the blocks that only some tokens take."""
    return [i for i, block in enumerate(self.layers()) if DEPTH in block]

  def with_routing(self, **changes) -> "ModelConfig":
    """Returns this config with some fields of the router replaced; the parameters still fit."""
    if self.moe is None:
      return self
    routing = dataclasses.replace(self.moe.routing, **changes)
    return dataclasses.replace(self, moe=dataclasses.replace(self.moe, routing=routing))

  def dropless(self) -> "ModelConfig":
    """Returns this config with room for every token: an output depends on its own sequence only.

    Uses ragged dispatch, which needs no capacity buffer. Where experts choose tokens, or slots mix
    them, nothing overflows and the config stays: outputs depend on the whole group by design.
    """
    if self.moe is None or self.moe.routing.selector.chooser != Chooser.TOKEN:
      return self
    config = self.with_routing(overflow=Overflow.DROPLESS, capacity=None)
    return dataclasses.replace(
      config, moe=dataclasses.replace(config.moe, dispatch=Dispatch.RAGGED)
    )


def _parse_segment(segment) -> Segment:
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
  return Segment(tuple(_parse_block(block) for block in pattern.split()), repeats)


def _parse_block(block: str) -> tuple[str, ...]:
  whole = [f"{mixer}:{kind}" for mixer in MIXERS for kind in FEED_FORWARDS]
  known = whole + [f"{each}:{DEPTH}" for each in whole]
  if block not in known:
    raise UserError(
      f"block {block!r} is not one of {', '.join(known)}; {did_you_mean(block, known)}"
    )
  return tuple(block.split(":"))
