"""Claims of papers as rules over cards, and the verdicts they come to.

A claim is written down, with its margin, before the first run that it judges.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats

from moe_jax.choices import as_choice
from moe_jax.errors import UserError
from moe_jax.sweep.cards import DIVERGED, Card, has_diverged, metric
from moe_jax.sweep.statistics import (
  Interval,
  equivalence_interval,
  interval,
  pooled_deviation,
  seeds_to_reach,
)


class Verdict(enum.StrEnum):
  """What became of a claim."""

  REPRODUCED = "REPRODUCED"
  NOT_REPRODUCED = "NOT REPRODUCED"
  INCONCLUSIVE = "INCONCLUSIVE"
  NOT_TESTABLE = "NOT TESTABLE AT THIS SCALE"


class Expects(enum.StrEnum):
  """What a claim says of a statistic."""

  BELOW = "below"
  ABOVE = "above"
  NO_DIFFERENCE = "no_difference"


@dataclasses.dataclass(frozen=True)
class Contrast:
  """One arm's metric minus, or relative to, another's, seed by seed.

  Attributes:
    metric: dotted path in a card, as `eval.loss`.
    arm: whose value it is.
    against: the arm it is compared with; empty = with nothing: the value itself.
    relative: divide by the other's value instead of subtracting it.
    own_metric_of_against: the other's metric, where it is another one; empty = the same.
  """

  metric: str
  arm: str
  against: str = ""
  relative: bool = False
  own_metric_of_against: str = ""

  @property
  def arms(self) -> tuple[str, ...]:
    """The arms that are read."""
    return tuple(filter(None, (self.arm, self.against)))

  def values(self, cards: Mapping[str, Sequence[Card]]) -> list[float]:
    """Returns the statistic of each seed."""
    own = [metric(card, self.metric) for card in cards[self.arm]]
    if not self.against:
      return own
    other = self._other(cards)
    if self.relative:
      return [a / b for a, b in zip(own, other, strict=True)]
    return [a - b for a, b in zip(own, other, strict=True)]

  def noise(self, cards: Mapping[str, Sequence[Card]]) -> float:
    """Returns the standard deviation over seeds, pooled over both arms.

    It is 0 where seeds have no part in the difference: of two evaluations of the same weights, of a
    ratio, or of a value that is compared with a number.
    """
    if self.against in ("", self.arm) or self.relative:
      return 0.0
    return pooled_deviation([metric(c, self.metric) for c in cards[self.arm]], self._other(cards))

  def _other(self, cards: Mapping[str, Sequence[Card]]) -> list[float]:
    name = self.own_metric_of_against or self.metric
    return [metric(card, name) for card in cards[self.against]]


@dataclasses.dataclass(frozen=True)
class Rank:
  """Kendall's tau between an order of arms that a paper gives and their metric, seed by seed.

  Attributes:
    metric: dotted path in a card.
    arms: in the order of the paper, its largest value first.
  """

  metric: str
  arms: tuple[str, ...]

  def values(self, cards: Mapping[str, Sequence[Card]]) -> list[float]:
    """Returns tau of each seed: 1 for the paper's order, -1 for its reverse."""
    table = np.array([[metric(card, self.metric) for card in cards[arm]] for arm in self.arms])
    places = -np.arange(len(self.arms))
    return [float(scipy.stats.kendalltau(places, column).statistic) for column in table.T]

  def noise(self, cards: Mapping[str, Sequence[Card]]) -> float:
    """Returns 0: an order has no scale."""
    del cards
    return 0.0


@dataclasses.dataclass(frozen=True)
class Speedup:
  """The tokens that one arm trains on, over those after which another is as good, seed by seed.

  As good: at the other's last held-out loss, on the straight line between two evaluations. An arm
  that never is as good counts as if it were at its end, so that the ratio is 1 at least; so does
  one that is already at its first evaluation, at that evaluation.

  Attributes:
    arm: the faster one.
    against: the arm whose last loss is to be reached.
  """

  arm: str
  against: str

  @property
  def arms(self) -> tuple[str, ...]:
    """The arms that are read."""
    return (self.arm, self.against)

  def values(self, cards: Mapping[str, Sequence[Card]]) -> list[float]:
    """Returns the ratio of each seed."""
    pairs = zip(cards[self.arm], cards[self.against], strict=True)
    return [_steps(other)[-1] / self._reached(own, other) for own, other in pairs]

  def noise(self, cards: Mapping[str, Sequence[Card]]) -> float:
    """Returns 0: the interval says it all."""
    del cards
    return 0.0

  def _reached(self, own: Card, other: Card) -> float:
    """Returns the step at which `own` is as good as `other` at its end."""
    wanted = other["curve"][-1][1]
    # Interpolation needs increasing values: losses that fall, and never rise again.
    best = np.minimum.accumulate([loss for _, loss in own["curve"]])
    return float(np.interp(-wanted, -best, _steps(own)))


def _steps(card: Card) -> list[float]:
  return [step for step, _ in card["curve"]]


@dataclasses.dataclass(frozen=True)
class Slope:
  """The slope of the logarithm of a metric over the logarithm of what sets arms apart, by seed.

  Attributes:
    metric: dotted path in a card.
    arms: name of each arm and its value on the axis, positive.
  """

  metric: str
  points: tuple[tuple[str, float], ...]

  @property
  def arms(self) -> tuple[str, ...]:
    """The arms that are read."""
    return tuple(arm for arm, _ in self.points)

  def values(self, cards: Mapping[str, Sequence[Card]]) -> list[float]:
    """Returns the least-squares slope of each seed."""
    table = np.array([[metric(card, self.metric) for card in cards[arm]] for arm in self.arms])
    x = np.log([value for _, value in self.points])
    return [float(np.polyfit(x, np.log(column), 1)[0]) for column in table.T]

  def noise(self, cards: Mapping[str, Sequence[Card]]) -> float:
    """Returns 0: the interval says it all."""
    del cards
    return 0.0


Statistic = Contrast | Rank | Slope | Speedup


@dataclasses.dataclass(frozen=True)
class Requirement:
  """What must have happened in some run, or else a claim cannot be tested.

  Attributes:
    metric: dotted path in a card; above 0 in the cards of the runs in which it happened.
    arms: in any of whose runs it suffices.
    unmet: why the claim cannot be tested where it happened in none, as "no run diverged".
  """

  metric: str
  arms: tuple[str, ...]
  unmet: str

  def is_met(self, cards: Mapping[str, Sequence[Card]]) -> bool:
    """Tells whether it happened."""
    return any(metric(card, self.metric) > 0 for arm in self.arms for card in cards[arm])


@dataclasses.dataclass(frozen=True)
class Claim:
  """A sentence of a paper, and when it counts as reproduced.

  Attributes:
    name: unique in its recipe.
    text: the claim, in a sentence.
    paper: key of the paper's number in experiments/paper_values.yaml; empty if it gives none.
    statistic: what is measured, seed by seed.
    expects: what the paper says of it.
    bound: with `below` and `above`, of what (0 for the sign of a difference); with
      `no_difference`, the margin, positive.
    requires: without which this scale cannot decide it; None = nothing.
  """

  name: str
  text: str
  statistic: Statistic
  expects: Expects
  bound: float = 0.0
  paper: str = ""
  requires: Requirement | None = None

  def __post_init__(self):
    object.__setattr__(self, "expects", as_choice(Expects, "expects", self.expects))
    if self.expects == Expects.NO_DIFFERENCE and not self.bound > 0:
      raise UserError(f"claim {self.name}: bound = {self.bound} is no margin; expected above 0")

  @property
  def arms(self) -> tuple[str, ...]:
    """The arms that must have run before it is judged."""
    required = () if self.requires is None else self.requires.arms
    return tuple(dict.fromkeys((*self.statistic.arms, *required)))


@dataclasses.dataclass(frozen=True)
class Finding:
  """A claim with what was measured.

  Attributes:
    claim: that was judged.
    verdict: what became of it.
    measured: the 95 % interval over seeds; None where a run that it reads has diverged.
    why: one sentence for a verdict that the numbers alone do not explain; may be empty.
  """

  claim: Claim
  verdict: Verdict
  measured: Interval | None
  why: str = ""


def expectation(claim: Claim) -> str:
  """Returns what a claim expects of its statistic, in a few words."""
  if claim.expects == Expects.NO_DIFFERENCE:
    return f"within ± {claim.bound:g}"
  return f"{claim.expects} {claim.bound:g}"


def judge(claim: Claim, cards: Mapping[str, Sequence[Card]]) -> Finding:
  """Judges a claim by the cards of all arms it reads, each in the order of the same seeds.

  A difference is reproduced if the 95 % interval of the paired differences lies on the claimed side
  of the bound, and its mean is at least twice the pooled standard deviation of seeds; "no
  difference" if the 90 % interval lies within the margin (two one-sided tests at 5 %). It
  is not reproduced if the 95 % interval lies wholly on the other side, or outside the margin. A
  run that diverged has no loss, and leaves claims about losses open.
  """
  if lost := _diverged(claim, cards):
    return Finding(claim, Verdict.INCONCLUSIVE, None, f"runs of {', '.join(lost)} diverged")
  values = claim.statistic.values(cards)
  measured = interval(values)
  if claim.requires is not None and not claim.requires.is_met(cards):
    return Finding(claim, Verdict.NOT_TESTABLE, measured, claim.requires.unmet)
  if claim.expects == Expects.NO_DIFFERENCE:
    return _judge_equality(claim, values, measured)
  return _judge_side(claim, values, measured, claim.statistic.noise(cards))


def _diverged(claim: Claim, cards: Mapping[str, Sequence[Card]]) -> list[str]:
  """Returns the arms of which a claim reads what their cards lack, as runs have diverged."""
  if getattr(claim.statistic, "metric", None) == DIVERGED:
    return []
  return [arm for arm in claim.statistic.arms if any(map(has_diverged, cards[arm]))]


def _judge_equality(claim: Claim, values: Sequence[float], measured: Interval) -> Finding:
  narrow = equivalence_interval(values)
  if -claim.bound < narrow.low and narrow.high < claim.bound:
    return Finding(claim, Verdict.REPRODUCED, measured)
  if measured.low >= claim.bound or measured.high <= -claim.bound:
    return Finding(claim, Verdict.NOT_REPRODUCED, measured)
  room = claim.bound - abs(measured.mean)
  return _inconclusive(claim, values, measured, abs(room), 0.9 if room > 0 else 0.95)


def _judge_side(claim: Claim, values: Sequence[float], measured: Interval, noise: float) -> Finding:
  sign = 1.0 if claim.expects == Expects.ABOVE else -1.0
  distance = sign * (measured.mean - claim.bound)
  # A quantity without spread may lie on the bound itself, as a perfect order does.
  beyond = distance > measured.half_width or (measured.half_width == 0 and distance == 0)
  if beyond and abs(measured.mean) >= 2 * noise:
    return Finding(claim, Verdict.REPRODUCED, measured)
  if distance < -measured.half_width:
    return Finding(claim, Verdict.NOT_REPRODUCED, measured)
  if beyond:
    why = f"significant, but under twice the {noise:.4g} that seeds differ by"
    return Finding(claim, Verdict.INCONCLUSIVE, measured, why)
  return _inconclusive(claim, values, measured, abs(distance), 0.95)


def _inconclusive(
  claim: Claim, values: Sequence[float], measured: Interval, room: float, confidence: float
) -> Finding:
  """Says how many seeds would settle it, if seeds would."""
  if len(values) < 2:
    return Finding(claim, Verdict.INCONCLUSIVE, measured, "one seed has no error bar")
  spread = float(np.std(values, ddof=1))
  n = seeds_to_reach(spread, room, confidence) if room > 0 else None
  why = "no number of seeds would settle it at this size" if n is None else f"needs n = {n} seeds"
  return Finding(claim, Verdict.INCONCLUSIVE, measured, why)
