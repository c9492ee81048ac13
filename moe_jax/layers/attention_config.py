"""What an attention layer is: heads, positions, what it sees, and how it is normalised."""

import dataclasses
import enum
import math

from moe_jax.choices import as_choice
from moe_jax.config.bounds import below
from moe_jax.errors import UserError
from moe_jax.layers.rope_scaling import RopeScaling

_ROPE_THETA = 10_000.0


class Positions(enum.StrEnum):
  """How a layer knows where its tokens are."""

  ROTARY = "rotary"  # arXiv 2104.09864
  NONE = "none"  # from the causal mask alone, or from a relative bias


class RotaryLayout(enum.StrEnum):
  """Which two of the K rotated dimensions make a pair."""

  HALVES = "halves"  # i and i + K / 2, as in LLaMA's converted weights
  PAIRS = "pairs"  # 2i and 2i + 1, as in RoFormer


class QKNorm(enum.StrEnum):
  """The RMSNorm of queries and keys."""

  NONE = "none"
  HEAD = "head"  # of each head, before the rotation, one scale for all heads (Qwen3)
  PROJECTION = "projection"  # over all heads together, before the rotation (OLMoE)
  L2 = "l2"  # of each head, after the rotation, without a scale (Llama 4)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Self-attention, or the attention of a decoder to its encoder's output.

  Attributes:
    num_heads: H query heads.
    num_kv_heads: key-value heads; must divide H (GQA, arXiv 2305.13245).
    head_dim: width of a head; even, for rotary positions.
    rope_theta: base of the rotary frequencies.
    window: real tokens a query looks back on, itself included; None = all. A window of the training
      length lets a model go on beyond it, since no distance is new.
    chunk: a query sees the tokens of its own chunk of this many positions (Llama 4); None = all.
    positions: how the layer knows where its tokens are.
    rotary_dim: the first dimensions of a head that are rotated; None = all of them.
    rotary_layout: which dimensions are rotated together.
    rope_scaling: lower frequencies for a longer context.
    relative_bias_buckets, relative_bias_max_distance: a learned number per head and bucket of
      distances is added to the logits (T5, arXiv 1910.10683 section 2.1): one bucket a distance for
      the first half, logarithmic ones up to the maximum for the rest; in an encoder, half of all
      buckets are for keys ahead of the query. None = no bias.
    relative_bias_shared: one such table for all layers of a stack (T5) instead of one a layer.
    softmax_scale: what query-key products are multiplied by; None = head_dim^-0.5.
    qkv_bias: biases on the query, key and value projections.
    out_bias: a bias on the output projection.
    qk_norm, qk_norm_epsilon: the RMSNorm of queries and keys.
    qkv_clip: queries, keys and values are clipped to [-clip, clip], after biases and a norm over
      the projection, before the rotation (DBRX, OLMoE); None = not.
    sinks: a learned logit per head joins the softmax's denominator (gpt-oss, after
      arXiv 2309.17453).
    query_temperature_floor, query_temperature_scale: queries are multiplied by
      log(1 + floor((position + 1) / floor)) * scale + 1 (Llama 4, after arXiv 2501.19399); without
      a floor they are not.
    query_block: queries whose products with all keys are in memory at a time, computed once more in
      the backward pass; None = all. The same result, less memory for a little more work.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = _ROPE_THETA
  window: int | None = None
  chunk: int | None = None
  positions: Positions = Positions.ROTARY
  rotary_dim: int | None = None
  rotary_layout: RotaryLayout = RotaryLayout.HALVES
  rope_scaling: RopeScaling | None = None
  relative_bias_buckets: int | None = None
  relative_bias_max_distance: int = 128
  relative_bias_shared: bool = False
  softmax_scale: float | None = None
  qkv_bias: bool = False
  out_bias: bool = False
  qk_norm: QKNorm = QKNorm.NONE
  qk_norm_epsilon: float = 1e-6
  qkv_clip: float | None = None
  sinks: bool = False
  query_temperature_floor: int | None = None
  query_temperature_scale: float = 0.1
  query_block: int | None = None

  def __post_init__(self):
    choices = {"positions": Positions, "rotary_layout": RotaryLayout, "qk_norm": QKNorm}
    for name, kind in choices.items():
      object.__setattr__(self, name, as_choice(kind, name, getattr(self, name)))
    check_at_least_one(self, "num_heads", "num_kv_heads", "head_dim")
    below(self, 2**31, "num_heads")
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f"num_kv_heads = {self.num_kv_heads} does not divide num_heads ="
        f" {self.num_heads}; the nearest that does is {self._nearest_divisor()}"
      )
    if self.positions == Positions.ROTARY:
      self._check_rotary()
    else:
      self._check_no_rotary()
    self._check_sight()
    self._check_relative_bias()
    check_positive(self, "qk_norm_epsilon", "qkv_clip", "softmax_scale", "query_temperature_scale")

  def _check_rotary(self) -> None:
    check_positive(self, "rope_theta")
    if self.rotary_dim is None:
      if self.head_dim % 2:
        raise UserError(
          f"head_dim = {self.head_dim} is odd; rotary positions need an even width,"
          f" for example {self.head_dim + 1}"
        )
    elif self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
      raise UserError(
        f"rotary_dim = {self.rotary_dim} is refused: it must be even, from 2 to head_dim ="
        f" {self.head_dim}"
      )
    if self.rope_scaling is not None:
      self.rope_scaling.check_width(self.rotary_dim or self.head_dim)

  def _check_no_rotary(self) -> None:
    unused = {
      "rope_theta": _ROPE_THETA,
      "rotary_dim": None,
      "rotary_layout": RotaryLayout.HALVES,
      "rope_scaling": None,
    }
    for name, default in unused.items():
      value = getattr(self, name)
      if value != default:
        shown = "a section" if dataclasses.is_dataclass(value) else value
        raise UserError(
          f"{name} = {shown} would be ignored: positions = none has no rotation; use"
          f" positions = rotary, or leave {name} out"
        )

  def _check_sight(self) -> None:
    check_block(self)
    for name in ("window", "chunk"):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise UserError(
          f"{name} = {getattr(self, name)} is refused: it must be at least 1, or None for all"
        )
    if self.window is not None and self.chunk is not None:
      raise UserError(
        f"window = {self.window} and chunk = {self.chunk} contradict each other: give one of them"
      )
    floor = self.query_temperature_floor
    if floor is not None and floor < 1:
      raise UserError(
        f"query_temperature_floor = {floor} is refused: it must be at least 1, or None for a"
        " temperature of 1"
      )

  def _check_relative_bias(self) -> None:
    buckets, distance = self.relative_bias_buckets, self.relative_bias_max_distance
    if buckets is None:
      if self.relative_bias_shared:
        raise UserError(
          "relative_bias_shared = True would be ignored: there is no bias to share; give"
          " relative_bias_buckets, or leave it out"
        )
      return
    if self.positions != Positions.NONE:
      raise UserError(
        f"relative_bias_buckets = {buckets} with positions = {self.positions} would count positions"
        " twice: use positions = none, or leave the buckets out"
      )
    if buckets < 2:
      raise UserError(f"relative_bias_buckets = {buckets} is refused: it must be at least 2")
    if distance <= buckets // 2:
      raise UserError(
        f"relative_bias_max_distance = {distance} is refused: the first {buckets // 2} distances"
        f" have buckets of their own, so it must be at least {buckets // 2 + 1}"
      )

  @property
  def scale(self) -> float:
    """Returns what query-key products are multiplied by."""
    return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

  def _nearest_divisor(self) -> int:
    small = [n for n in range(1, math.isqrt(self.num_heads) + 1) if self.num_heads % n == 0]
    divisors = {*small, *(self.num_heads // n for n in small)}
    return min(sorted(divisors), key=lambda n: abs(n - self.num_kv_heads))


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig:
  """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1).

  Keys and values of all heads are linear maps of one latent vector a token; a small rotated key,
  shared by the heads, carries the positions. The cache holds those two alone.

  Attributes:
    num_heads: H.
    kv_rank: width of the latent of keys and values.
    nope_dim: width of a head's query and key without positions.
    rope_dim: width of their rotated part; even.
    value_dim: width of a head's value.
    query_rank: width of the queries' latent; None = queries are projected directly (V2-Lite).
    rope_theta, rotary_layout, rope_scaling: as in `AttentionConfig`.
    norm_epsilon: of the RMSNorms of the latents; 1e-6 in all releases, whatever the model's.
    query_block: as in `AttentionConfig`.
  """

  num_heads: int
  kv_rank: int
  nope_dim: int
  rope_dim: int
  value_dim: int
  query_rank: int | None = None
  rope_theta: float = _ROPE_THETA
  rotary_layout: RotaryLayout = RotaryLayout.PAIRS
  rope_scaling: RopeScaling | None = None
  norm_epsilon: float = 1e-6
  query_block: int | None = None

  def __post_init__(self):
    layout = as_choice(RotaryLayout, "rotary_layout", self.rotary_layout)
    object.__setattr__(self, "rotary_layout", layout)
    check_at_least_one(self, "num_heads", "kv_rank", "nope_dim", "rope_dim", "value_dim")
    if self.query_rank is not None and self.query_rank < 1:
      raise UserError(
        f"query_rank = {self.query_rank} is refused: it must be at least 1, or None for a direct"
        " projection"
      )
    check_block(self)
    if self.rope_dim % 2:
      raise UserError(
        f"rope_dim = {self.rope_dim} is odd; rotary positions need an even width,"
        f" for example {self.rope_dim + 1}"
      )
    if self.rope_scaling is not None:
      self.rope_scaling.check_width(self.rope_dim)
    check_positive(self, "rope_theta", "norm_epsilon")

  @property
  def scale(self) -> float:
    """Returns what query-key products are multiplied by."""
    factor = 1.0 if self.rope_scaling is None else self.rope_scaling.softmax_factor
    return (self.nope_dim + self.rope_dim) ** -0.5 * factor


def check_block(config: AttentionConfig | LatentAttentionConfig) -> None:
  """Raises UserError for a block without queries."""
  if config.query_block is not None and config.query_block < 1:
    raise UserError(
      f"query_block = {config.query_block} is refused: it must be at least 1, or None for all"
      " queries at once"
    )


def check_at_least_one(config, *names: str) -> None:
  """Raises UserError for the first of the fields that is below 1."""
  for name in names:
    if getattr(config, name) < 1:
      raise UserError(f"{name} = {getattr(config, name)} is refused: it must be at least 1")


def check_positive(config, *names: str) -> None:
  """Raises UserError for the first of the fields that is given and not a number above 0."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not 0 < value < math.inf:
      raise UserError(f"{name} = {value} is refused: it must be greater than 0")
