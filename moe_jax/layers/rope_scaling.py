"""Stretching rotary positions beyond the training length: a factor for every frequency."""

import dataclasses
import enum
import math

import numpy as np

from moe_jax.choices import as_choice
from moe_jax.errors import UserError


class RopeScalingKind(enum.StrEnum):
  """How frequencies are lowered for contexts `factor` times the original."""

  LINEAR = "linear"  # all alike: position interpolation (arXiv 2306.15595)
  YARN = "yarn"  # the slow ones alone, by rotations within the context (arXiv 2309.00071)
  LLAMA3 = "llama3"  # the slow ones alone, by wavelength (Llama 3, arXiv 2407.21783)
  LONGROPE = "longrope"  # each by a number of its own, found by search (arXiv 2402.13753)


_FIELDS_OF = {
  RopeScalingKind.LINEAR: (),
  RopeScalingKind.YARN: (
    "original_max_position",
    "beta_fast",
    "beta_slow",
    "truncate",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
  ),
  RopeScalingKind.LLAMA3: ("original_max_position", "low_freq_factor", "high_freq_factor"),
  RopeScalingKind.LONGROPE: (
    "original_max_position",
    "short_factors",
    "long_factors",
    "short_mscale",
    "long_mscale",
    "attention_factor",
  ),
}
_POSITIVE = (
  *("beta_slow", "mscale", "mscale_all_dim", "attention_factor", "low_freq_factor"),
  *("short_mscale", "long_mscale"),
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies change for a longer context; each kind has fields of its own.

  Attributes:
    kind: the rule.
    factor: how much longer the context is, at least 1.
    original_max_position: the context of the original training; all but `linear` need it.
    beta_fast, beta_slow: of `yarn`: dimensions with more rotations than beta_fast in the original
      context keep their frequency, those with fewer than beta_slow are divided by the factor.
    truncate: of `yarn`: the bounds of the ramp in between are rounded outwards to whole dimensions.
    mscale, mscale_all_dim: of `yarn`, DeepSeek's (arXiv 2405.04434 section 3.1.4): with both given,
      cosine and sine are multiplied by m(mscale) / m(mscale_all_dim), m(s) = 0.1 s ln(factor) + 1,
      instead of by m(1); latent attention multiplies its softmax scale by m(mscale_all_dim)^2.
    attention_factor: of `yarn` and `longrope`: what cosine and sine are multiplied by, instead of
      the above, or of sqrt(1 + ln(factor) / ln(original_max_position)).
    low_freq_factor, high_freq_factor: of `llama3`: wavelengths beyond original_max_position /
      low_freq_factor are scaled whole, those below original_max_position / high_freq_factor not;
      equal ones leave nothing in between (Llama 4 Scout).
    short_factors, long_factors: of `longrope`: what each of the K / 2 frequencies is divided by, in
      sequences of up to original_max_position tokens and in longer ones. Every call decides for
      every sequence: keys in a cache stay as they were when a sequence outgrows the length
      (transformers' Phi computes them again, its other families do not).
    short_mscale, long_mscale: of `longrope`: what cosine and sine are multiplied by in those two,
      instead of by attention_factor (Phi-3.5-MoE).
  """

  kind: RopeScalingKind
  factor: float
  original_max_position: int | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  mscale: float | None = None
  mscale_all_dim: float | None = None
  attention_factor: float | None = None
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  short_factors: tuple[float, ...] | None = None
  long_factors: tuple[float, ...] | None = None
  short_mscale: float | None = None
  long_mscale: float | None = None

  def __post_init__(self):
    object.__setattr__(self, "kind", as_choice(RopeScalingKind, "kind", self.kind))
    if not 1 <= self.factor < math.inf:
      raise UserError(f"factor = {self.factor} is refused: rope scaling needs at least 1")
    self._check_belongs()
    needed = "original_max_position" in _FIELDS_OF[self.kind]
    if needed and (self.original_max_position is None or self.original_max_position < 1):
      raise UserError(
        f"original_max_position = {self.original_max_position} is refused: kind = {self.kind} needs"
        " the context length of the original training, at least 1"
      )
    for name in _POSITIVE:
      value = getattr(self, name)
      if value is not None and not 0 < value < math.inf:
        raise UserError(f"{name} = {value} is refused: it must be greater than 0")
    self._check_factors()
    if not self.beta_slow < self.beta_fast < math.inf:
      raise UserError(
        f"beta_fast = {self.beta_fast} is refused: it must be greater than beta_slow ="
        f" {self.beta_slow}"
      )
    if not self.low_freq_factor <= self.high_freq_factor < math.inf:
      raise UserError(
        f"high_freq_factor = {self.high_freq_factor} is refused: it must be at least"
        f" low_freq_factor = {self.low_freq_factor}"
      )

  def _check_factors(self) -> None:
    if self.kind != RopeScalingKind.LONGROPE:
      return
    for name in ("short_factors", "long_factors"):
      value = getattr(self, name)
      if not value or not all(0 < each < math.inf for each in value):
        raise UserError(
          f"{name} = {value} is refused: kind = {self.kind} needs a number above 0 for every"
          " frequency"
        )

  def check_width(self, rotary_dim: int) -> None:
    """Raises UserError unless lists of factors have one for each frequency of K dimensions."""
    for name in ("short_factors", "long_factors"):
      value = getattr(self, name)
      if value is not None and len(value) != rotary_dim // 2:
        raise UserError(
          f"{name} has {len(value)} numbers, expected {rotary_dim // 2}: one for every two of the"
          f" {rotary_dim} dimensions that are rotated"
        )

  def _check_belongs(self) -> None:
    for field in dataclasses.fields(self):
      value, own = getattr(self, field.name), _FIELDS_OF[self.kind]
      if field.name not in ("kind", "factor", *own) and value != field.default:
        raise UserError(
          f"{field.name} = {value} would be ignored: kind = {self.kind} has"
          f" {', '.join(('factor', *own))}"
        )

  @property
  def table_factor(self) -> float:
    """Returns what cosines and sines are multiplied by.

    See arXiv 2309.00071 Eq. 22, and arXiv 2402.13753 section 4 for `longrope`.
    """
    if self.short_mscale is not None:
      return self.short_mscale
    if self.attention_factor is not None:
      return self.attention_factor
    if self.kind == RopeScalingKind.LONGROPE:
      return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position))
    if self.kind != RopeScalingKind.YARN:
      return 1.0
    if self.mscale and self.mscale_all_dim:
      return self._m(self.mscale) / self._m(self.mscale_all_dim)
    return self._m(1.0)

  @property
  def softmax_factor(self) -> float:
    """Returns what latent attention multiplies its softmax scale by."""
    return self._m(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

  def _m(self, scale: float) -> float:
    return 0.1 * scale * math.log(self.factor) + 1.0

  @property
  def beyond(self) -> "RopeScaling":
    """Returns what holds in sequences longer than original_max_position: of `longrope`, another."""
    if self.kind != RopeScalingKind.LONGROPE:
      return self
    return dataclasses.replace(self, short_factors=self.long_factors, short_mscale=self.long_mscale)

  def frequency_factors(self, rotary_dim: int, theta: float) -> np.ndarray:
    """Returns what each frequency theta^(-2i / K) is multiplied by: (K / 2,) float64.

    Args:
      rotary_dim: K, the number of rotated dimensions.
      theta: base of the frequencies.
    """
    if self.kind == RopeScalingKind.LONGROPE:
      return 1 / np.asarray(self.short_factors, np.float64)
    frequency = theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    if self.kind == RopeScalingKind.LINEAR:
      scaled = np.ones_like(frequency)
    elif self.kind == RopeScalingKind.YARN:
      scaled = self._yarn_ramp(rotary_dim, theta)
    else:
      scaled = self._llama3_ramp(frequency)
    return scaled / self.factor + (1 - scaled)

  def _yarn_ramp(self, rotary_dim: int, theta: float) -> np.ndarray:
    """Returns how far each dimension is interpolated, 0 to 1 (arXiv 2309.00071 Eq. 18).

    The ramp is linear in the dimension, as in the released code; the paper's is in the rotations.
    """

    def dimension(rotations):
      ratio = self.original_max_position / (rotations * 2 * math.pi)
      return rotary_dim * math.log(ratio) / (2 * math.log(theta))

    low, high = dimension(self.beta_fast), dimension(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low or 1e-3
    return np.clip((np.arange(rotary_dim // 2) - low) / width, 0.0, 1.0)

  def _llama3_ramp(self, frequency: np.ndarray) -> np.ndarray:
    """Returns how far each frequency is interpolated, 0 to 1, by its rotations in the context."""
    rotations = self.original_max_position * frequency / (2 * math.pi)
    width = self.high_freq_factor - self.low_freq_factor
    if not width:
      return (rotations < self.low_freq_factor).astype(np.float64)
    return 1 - np.clip((rotations - self.low_freq_factor) / width, 0.0, 1.0)
