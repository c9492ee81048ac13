"""What a model is: widths, and segments of block patterns."""

import dataclasses
import enum
import math

from moe_jax.choices import as_choice
from moe_jax.errors import UserError
from moe_jax.layers.attention_config import AttentionConfig, LatentAttentionConfig
from moe_jax.layers.mamba_config import MambaConfig
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.layers.norms import Norm
from moe_jax.models.depth_config import DepthConfig
from moe_jax.models.encoder_config import EncoderConfig
from moe_jax.models.segments import DEPTH, FEED_FORWARDS, MIXERS, Segment, parse_segment
from moe_jax.models.vision_config import VisionConfig
from moe_jax.moe.dispatch import Dispatch
from moe_jax.moe.layer import MoEConfig
from moe_jax.moe.options import Overflow
from moe_jax.moe.registry import Chooser

# Each is a block of its own in the program, whose compilation takes so much longer.
_MOST_FURTHER = 16

MixerConfig = AttentionConfig | LatentAttentionConfig | MambaConfig


class Remat(enum.StrEnum):
  """What the backward pass recomputes instead of storing, per repeat of a segment's pattern."""

  NONE = "none"
  FULL = "full"  # everything: least memory, about a third more work
  DOTS = "dots"  # everything but matrix products


class NormPlacement(enum.StrEnum):
  """Where the norms of the residual stream stand."""

  PRE = "pre"  # x + f(norm(x)), and one norm after the last block
  POST = "post"  # norm(x + f(x)) (arXiv 1706.03762), and none after the last block


class PositionEmbedding(enum.StrEnum):
  """What is added to the tokens' embeddings to tell their places."""

  NONE = "none"  # the mixers know
  SINUSOIDAL = "sinusoidal"  # see `moe_jax.layers.sinusoidal`


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A language model: a decoder, or with `encoder` the decoder behind an encoder.

  A section that no block uses is None, `mlp` excepted, and the other way round.

  Attributes:
    vocab_size: V.
    model_dim: D.
    segments: ((pattern, repeats), ...); a pattern is a string of blocks "mixer:feed_forward", for
      example "attention:dense attention:moe": Switch's alternation. "mixer:feed_forward:depth" is
      a block that takes only some tokens, see `depth`.
    attention: the mixer "attention"; its fields are flattened into the model's level in config
      files.
    mlp: the feed-forward "dense".
    moe: the feed-forward "moe".
    depth: the blocks marked ":depth" (Mixture-of-Depths).
    global_attention: the mixer "global_attention", the second kind of models that interleave two:
      layers without a window among layers with one.
    latent_attention: the mixer "latent_attention".
    mamba: the mixer "mamba", a selective state space.
    encoder: another stack, of its own parameters but for the embedding, whose output all blocks of
      the decoder look at.
    cross_attention: how they do, between mixer and feed-forward.
    vision: a tower that images go through, whose output stands for the tokens of images.
    position_embedding, position_offset: what is added to the embeddings, and the number of a row's
      first position.
    norm, norm_epsilon: of the residual stream.
    norm_placement: where in it they stand.
    tie_embeddings: the head is the transposed embedding.
    head_bias: a bias on the logits (Phi).
    embedding_multiplier, residual_multiplier: factors of the embedding, and of what every mixer and
      feed-forward adds to the residual stream (Granite).
    logits_divisor: what the logits are divided by (Granite).
    mtp_depth: further tokens that training predicts at every place, besides the next one
      (DeepSeek-V3, see `moe_jax.models.multi_token`); each costs a block like the last one.
    mtp_loss_weight: coefficient of the mean over depths of their cross-entropies; DeepSeek-V3 takes
      0.3 for most of its training, then 0.1.
    dropout: rate on the embedding and on the output of every mixer and feed-forward, in training.
    init_scale: of the blocks' matrices, see `moe_jax.layers.parameters.parameter`; Switch uses
      0.1. Embedding and head keep 1.0.
    dtype: of activations, "float32" or "bfloat16"; parameters and the router stay float32.
    remat: memory for work in the backward pass.
    scan_unroll: repeats of a segment's pattern in one iteration of its scan; more compile time for
      less loop overhead. XLA's CPU backend gains about a fifth on small models.
  """

  vocab_size: int
  model_dim: int
  segments: tuple[tuple[str, int], ...]
  attention: AttentionConfig | None = dataclasses.field(default=None, metadata={"flatten": True})
  mlp: FeedForwardConfig | None = None
  moe: MoEConfig | None = None
  depth: DepthConfig | None = None
  global_attention: AttentionConfig | None = None
  latent_attention: LatentAttentionConfig | None = None
  mamba: MambaConfig | None = None
  encoder: EncoderConfig | None = None
  cross_attention: AttentionConfig | None = None
  vision: VisionConfig | None = None
  position_embedding: PositionEmbedding = PositionEmbedding.NONE
  position_offset: int = 0
  norm: Norm = Norm.RMSNORM
  norm_placement: NormPlacement = NormPlacement.PRE
  norm_epsilon: float = 1e-6
  tie_embeddings: bool = False
  head_bias: bool = False
  embedding_multiplier: float = 1.0
  residual_multiplier: float = 1.0
  logits_divisor: float = 1.0
  mtp_depth: int = 0
  mtp_loss_weight: float = 0.3
  dropout: float = 0.0
  init_scale: float = 1.0
  dtype: str = "float32"
  remat: Remat = Remat.NONE
  scan_unroll: int = 1

  def __post_init__(self):
    choices = {
      "remat": Remat,
      "norm": Norm,
      "norm_placement": NormPlacement,
      "position_embedding": PositionEmbedding,
    }
    for name, kind in choices.items():
      object.__setattr__(self, name, as_choice(kind, name, getattr(self, name)))
    for name in ("vocab_size", "model_dim", "scan_unroll"):
      if getattr(self, name) < 1:
        raise UserError(f"{name} = {getattr(self, name)} is refused: it must be at least 1")
    if self.dtype not in ("float32", "bfloat16"):
      raise UserError(f"dtype = {self.dtype!r} is not one of float32, bfloat16")
    if not 0.0 <= self.dropout < 1.0:
      raise UserError(f"dropout = {self.dropout} is refused: it must be in [0, 1)")
    for name in (
      "init_scale",
      "norm_epsilon",
      "embedding_multiplier",
      "residual_multiplier",
      "logits_divisor",
    ):
      if not 0 < getattr(self, name) < math.inf:
        raise UserError(f"{name} = {getattr(self, name)} is refused: it must be greater than 0")
    if self.mtp_depth < 0 or not 0 <= self.mtp_loss_weight < math.inf:
      raise UserError(
        f"mtp_depth = {self.mtp_depth} with mtp_loss_weight = {self.mtp_loss_weight} is refused:"
        " both must be 0 or greater"
      )
    if self.mtp_depth > _MOST_FURTHER:
      raise UserError(
        f"mtp_depth = {self.mtp_depth} is refused: it must be at most {_MOST_FURTHER}"
      )
    self._check_encoder()
    self._check_vision()
    self._check_sections()
    self._check_experts()
    self._check_stream()
    # JSON gives lists, and a config must be hashable: it is part of what is compiled.
    object.__setattr__(self, "segments", tuple(map(tuple, self.segments)))

  def _check_sections(self) -> None:
    """Refuses a block without its section, and a section without its block."""
    blocks = [block for segment in self.parsed_segments() for block in segment.pattern]
    words = {word for block in blocks for word in block}
    # An encoder's mixer is `EncoderConfig.attention`; the feed-forwards are those of both.
    words |= {word for block in self._encoder_layers() for word in block[1:]}
    if self.global_attention and self.global_attention.relative_bias_shared:
      raise UserError(
        "global_attention.relative_bias_shared = True is refused: only the mixer attention shares"
        " its bias; leave it out"
      )
    for word, name in (MIXERS | FEED_FORWARDS).items():
      given = getattr(self, name) is not None
      if word in words and not given:
        raise UserError(f"segments = {self.segments} has {word} blocks but {name} is None")
      # A config file's segments may lose their dense blocks on the command line.
      if given and word not in words and word != "dense":
        example = f"{word}:dense" if word in MIXERS else f"attention:{word}"
        raise UserError(
          f"segments = {self.segments} has no {word} block, so {name} would be ignored; leave"
          f" {name} out, or use for example {example!r}"
        )
    if (DEPTH in words) != (self.depth is not None):
      raise UserError(
        f"segments = {self.segments} and depth = {self.depth} contradict each other: blocks such"
        " as 'attention:dense:depth' need a depth section, and a depth section such blocks"
      )
    if any(block[0] == "mamba" and DEPTH in block for block in blocks):
      raise UserError(
        f"segments = {self.segments} has a mamba block that only some tokens take, which is not"
        " supported: use for example 'attention:dense:depth', or 'mamba:dense' for all tokens"
      )

  def _check_stream(self) -> None:
    if self.norm_placement == NormPlacement.POST and (self.depth is not None or self.mtp_depth):
      raise UserError(
        f"norm_placement = post with depth = {self.depth} and mtp_depth = {self.mtp_depth} is"
        " refused: both add to a residual stream that no norm cuts; use norm_placement = pre"
      )
    embedding = self.position_embedding
    if embedding == PositionEmbedding.NONE and self.position_offset:
      raise UserError(
        f"position_offset = {self.position_offset} would be ignored with position_embedding = none:"
        " use sinusoidal, or leave it out"
      )
    if self.position_offset < 0:
      raise UserError(
        f"position_offset = {self.position_offset} is refused: it must be 0 or greater"
      )
    if embedding == PositionEmbedding.SINUSOIDAL and (self.model_dim % 2 or self.model_dim < 4):
      raise UserError(
        f"model_dim = {self.model_dim} is refused: sinusoidal embeddings are sines and cosines, so"
        " it must be even and at least 4"
      )

  def _check_encoder(self) -> None:
    """Refuses an encoder and what does not go with one."""
    if (self.encoder is None) != (self.cross_attention is None):
      given = "encoder" if self.cross_attention is None else "cross_attention"
      raise UserError(
        f"{given} is given alone: a decoder looks at its encoder's output by cross_attention, so"
        " give encoder and cross_attention, or neither"
      )
    if self.encoder is None:
      return
    if self.depth is not None or self.mtp_depth:
      raise UserError(
        f"depth = {self.depth} and mtp_depth = {self.mtp_depth} are refused behind an encoder:"
        " leave both out"
      )
    cross, plain = self.cross_attention, AttentionConfig(1, 1, 2, positions="none")
    for name in (
      "positions",
      "window",
      "chunk",
      "relative_bias_buckets",
      "query_temperature_floor",
    ):
      if getattr(cross, name) != getattr(plain, name):
        raise UserError(
          f"cross_attention.{name} = {getattr(cross, name)} is refused: an encoder's output has no"
          f" place relative to the decoder's tokens; expected {getattr(plain, name)}"
        )
    if not 0 <= self.encoder.start_token < self.vocab_size:
      raise UserError(
        f"encoder.start_token = {self.encoder.start_token} is refused: it must be an id, from 0 to"
        f" {self.vocab_size - 1}"
      )
    others = {word for block in self._encoder_layers() for word in block}
    others -= {"attention", *FEED_FORWARDS}
    if others:
      raise UserError(
        f"encoder.segments = {self.encoder.segments} has {others.pop()} blocks; expected"
        f" attention and {' or '.join(FEED_FORWARDS)}, as in 'attention:dense attention:moe'"
      )

  def _check_vision(self) -> None:
    if self.vision is None:
      return
    if self.encoder is not None or self.mtp_depth:
      having = f"mtp_depth = {self.mtp_depth}" if self.encoder is None else "an encoder"
      raise UserError(
        f"vision is refused with {having}: the tokens of images are known to a decoder's first"
        " layer alone; leave one of the two out"
      )
    if not 0 <= self.vision.image_token < self.vocab_size:
      raise UserError(
        f"vision.image_token = {self.vision.image_token} is refused: it must be an id, from 0 to"
        f" {self.vocab_size - 1}"
      )

  def _check_experts(self) -> None:
    if self.moe is None:
      return
    self.moe.check_width(self.model_dim)
    routing = self.moe.routing
    hashes_several = routing.selection == "hash" and routing.hash_ngram > 1
    if hashes_several and any(block[1:] == ("moe", DEPTH) for block in self.layers()):
      raise UserError(
        f"hash_ngram = {routing.hash_ngram} is refused: it must be 1 in a 'moe:depth' block,"
        " which does not see the tokens it leaves out"
      )

  def parsed_segments(self) -> tuple[Segment, ...]:
    """Returns the segments with their patterns taken apart."""
    if not (self.segments and isinstance(self.segments, (tuple, list))):
      raise UserError(
        f"segments = {self.segments!r} is refused: a model needs at least one"
        " (pattern, repeats) pair, for example"
        " (('attention:dense attention:moe', 2),)"
      )
    return tuple(parse_segment(segment) for segment in self.segments)

  def layers(self) -> list[tuple[str, ...]]:
    """Returns (mixer, feed-forward), and "depth" after them if so, of every block in order."""
    return [block for s in self.parsed_segments() for block in s.pattern * s.repeats]

  @property
  def draws_numbers(self) -> bool:
    """Tells whether training needs a random key."""
    experts = self.moe is not None and self.moe.needs_key
    return bool(self.dropout or (self.mlp and self.mlp.dropout) or experts)

  def _encoder_layers(self) -> list[tuple[str, ...]]:
    """Returns the words of every block of the encoder in order, none without one."""
    segments = map(parse_segment, self.encoder.segments if self.encoder else ())
    return [block for s in segments for block in s.pattern * s.repeats]

  def encoder_stack(self) -> "ModelConfig | None":
    """Returns the encoder as a model's config of its own, None without one."""
    if self.encoder is None:
      return None
    has_experts = any(block[1] == "moe" for block in self._encoder_layers())
    return dataclasses.replace(
      self,
      segments=self.encoder.segments,
      attention=self.encoder.attention,
      moe=self.moe if has_experts else None,
      encoder=None,
      cross_attention=None,
      global_attention=None,
      latent_attention=None,
      mamba=None,
    )

  def vision_stack(self) -> "ModelConfig | None":
    """Returns the tower's blocks as a model's config of their own, None without one."""
    if self.vision is None:
      return None
    return ModelConfig(
      vocab_size=self.vocab_size,
      model_dim=self.vision.model_dim,
      segments=(("attention:dense", self.vision.num_layers),),
      attention=self.vision.attention(),
      mlp=self.vision.feed_forward(),
      norm=Norm.LAYERNORM,
      norm_epsilon=self.vision.norm_epsilon,
      **{name: getattr(self, name) for name in ("init_scale", "dtype", "remat", "scan_unroll")},
    )

  def moe_layers(self, *, train: bool = False) -> list[int]:
    """Returns the indices of the blocks with experts; training has those of `mtp_depth` behind.

    An encoder's blocks come first.
    """
    kinds = [block[1] for block in self._encoder_layers() + self.layers()]
    kinds += kinds[-1:] * (self.mtp_depth if train else 0)
    return [i for i, kind in enumerate(kinds) if kind == "moe"]

  def depth_layers(self) -> list[int]:
    """Returns the indices of the blocks that only some tokens take."""
    return [i for i, block in enumerate(self.layers()) if DEPTH in block]

  def mixers(self) -> dict[str, MixerConfig]:
    """Returns the mixers that the model has, by the word that patterns use."""
    sections = {word: getattr(self, name) for word, name in MIXERS.items()}
    return {word: section for word, section in sections.items() if section is not None}

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
