"""Verdicts by the rules that are written down, on cards made up to lie on either side of them."""

import pytest

from moe_jax.errors import UserError
from moe_jax.sweep.cards import metric
from moe_jax.sweep.claims import (
  Claim,
  Contrast,
  Expects,
  Rank,
  Requirement,
  Slope,
  Speedup,
  Verdict,
  judge,
)

BASE = (1.50, 1.51, 1.49)


def _cards(**losses):
  return {
    arm: [
      {"arm": arm, "seed": seed, "eval": {"loss": value}, "other": {"loss": 2 * value}}
      for seed, value in enumerate(values)
    ]
    for arm, values in losses.items()
  }


def _claim(expects, bound=0.0, statistic=None, **fields):
  statistic = statistic or Contrast("eval.loss", "a", "b")
  return Claim("name", "text", statistic, expects, bound, **fields)


def _shifted(*by):
  return tuple(b + d for b, d in zip(BASE, by, strict=True))


@pytest.mark.parametrize(
  ("expects", "bound", "differences", "verdict"),
  [
    # 0.06 is six pooled deviations of 0.01, and hardly varies.
    (Expects.ABOVE, 0.0, (0.060, 0.061, 0.059), Verdict.REPRODUCED),
    (Expects.ABOVE, 0.05, (0.060, 0.061, 0.059), Verdict.REPRODUCED),
    (Expects.ABOVE, 0.08, (0.060, 0.061, 0.059), Verdict.NOT_REPRODUCED),
    (Expects.BELOW, 0.0, (0.060, 0.061, 0.059), Verdict.NOT_REPRODUCED),
    (Expects.BELOW, 0.0, (-0.060, -0.061, -0.059), Verdict.REPRODUCED),
    # The interval of the paired differences excludes 0, but seeds differ by more than half of it.
    (Expects.ABOVE, 0.0, (0.010, 0.011, 0.009), Verdict.INCONCLUSIVE),
    # The interval holds 0.
    (Expects.ABOVE, 0.0, (0.060, -0.061, 0.059), Verdict.INCONCLUSIVE),
    (Expects.NO_DIFFERENCE, 0.02, (0.001, -0.002, 0.002), Verdict.REPRODUCED),
    (Expects.NO_DIFFERENCE, 0.02, (0.060, 0.061, 0.059), Verdict.NOT_REPRODUCED),
    (Expects.NO_DIFFERENCE, 0.02, (-0.060, -0.061, -0.059), Verdict.NOT_REPRODUCED),
    (Expects.NO_DIFFERENCE, 0.02, (0.03, -0.02, 0.01), Verdict.INCONCLUSIVE),
  ],
)
def test_verdict_of_a_difference(expects, bound, differences, verdict):
  cards = _cards(a=_shifted(*differences), b=BASE)
  finding = judge(_claim(expects, bound), cards)
  assert finding.verdict == verdict
  assert finding.measured.mean == pytest.approx(sum(differences) / 3)


def test_differences_are_paired_by_seed():
  """Seeds that differ by far more than the arms do do not hide that one arm is always better."""
  cards = _cards(a=(1.06, 3.06, 2.07), b=(1.0, 3.0, 2.0))
  finding = judge(_claim(Expects.ABOVE), cards)
  assert finding.measured.low > 0
  assert finding.verdict == Verdict.INCONCLUSIVE
  assert "twice" in finding.why


def test_inconclusive_tells_the_seeds_that_would_settle_it():
  finding = judge(_claim(Expects.ABOVE), _cards(a=_shifted(0.03, -0.02, 0.05), b=BASE))
  assert finding.verdict == Verdict.INCONCLUSIVE
  n = int(finding.why.split("n = ")[1].split()[0])
  assert n > 3


@pytest.mark.parametrize("middle", [0.01, 0.03])
def test_so_it_does_of_no_difference_on_either_side_of_the_margin(middle):
  differences = [middle + off for off in (-0.015, 0.0, 0.015)]
  claim = _claim(Expects.NO_DIFFERENCE, 0.02)
  finding = judge(claim, _cards(a=_shifted(*differences), b=BASE))
  assert finding.verdict == Verdict.INCONCLUSIVE
  n = int(finding.why.split("n = ")[1].split()[0])
  # The room is 0.67 spreads; t / sqrt(n) falls below that at 9 (90 %) and at 12 seeds (95 %).
  assert n == {0.01: 9, 0.03: 12}[middle]


def test_one_seed_decides_nothing():
  finding = judge(_claim(Expects.ABOVE), _cards(a=(9.0,), b=(1.0,)))
  assert finding.verdict == Verdict.INCONCLUSIVE


def test_the_same_weights_evaluated_twice_have_no_noise_of_seeds():
  statistic = Contrast("eval.loss", "a", "a", own_metric_of_against="other.loss")
  finding = judge(_claim(Expects.BELOW, statistic=statistic), _cards(a=(0.010, 0.030, 0.020)))
  assert finding.verdict == Verdict.INCONCLUSIVE
  finding = judge(_claim(Expects.BELOW, statistic=statistic), _cards(a=(0.020, 0.030, 0.025)))
  assert finding.verdict == Verdict.REPRODUCED
  assert finding.measured.mean == pytest.approx(-0.025)


def test_a_ratio_is_taken_seed_by_seed():
  statistic = Contrast("eval.loss", "a", "b", relative=True)
  finding = judge(
    _claim(Expects.ABOVE, 1.5, statistic), _cards(a=(2.0, 4.1, 6.0), b=(1.0, 2.0, 3.0))
  )
  assert finding.verdict == Verdict.REPRODUCED
  assert finding.measured.mean == pytest.approx((2 + 2.05 + 2) / 3)


def test_order_of_arms_is_kendalls_tau():
  cards = _cards(a=(3.0, 3.0), b=(2.0, 1.0), c=(1.0, 2.0))
  rank = Rank("eval.loss", ("a", "b", "c"))
  assert rank.values(cards) == pytest.approx([1.0, 1 / 3])
  assert rank.values(_cards(c=(3.0,), b=(2.0,), a=(1.0,))) == pytest.approx([-1.0])
  perfect = _cards(a=(3.0, 3.0), b=(2.0, 2.0), c=(1.0, 1.0))
  assert judge(_claim(Expects.ABOVE, 0.7, rank), perfect).verdict == Verdict.REPRODUCED
  assert judge(_claim(Expects.ABOVE, 1.0, rank), perfect).verdict == Verdict.REPRODUCED
  assert judge(_claim(Expects.BELOW, 0.0, rank), perfect).verdict == Verdict.NOT_REPRODUCED


def test_slope_is_the_exponent_of_a_power_law():
  points = (("a", 1.0), ("b", 4.0), ("c", 16.0))
  cards = _cards(**{arm: (5 * x**-0.25, 3 * x**-0.25) for arm, x in points})
  assert Slope("eval.loss", points).values(cards) == pytest.approx([-0.25, -0.25])


def test_a_claim_is_not_testable_where_what_it_requires_happened_in_no_run():
  required = Requirement("other.loss", ("b",), "no run diverged at any learning rate")
  claim = _claim(Expects.ABOVE, requires=required)
  assert claim.arms == ("a", "b")
  cards = _cards(a=(9.0, 9.1), b=(0.0, 0.0))
  finding = judge(claim, cards)
  assert (finding.verdict, finding.why) == (Verdict.NOT_TESTABLE, required.unmet)
  assert finding.measured.mean == pytest.approx(9.05)
  once = _cards(a=(9.0, 9.1), b=(0.0, 0.01))
  assert judge(claim, once).verdict == Verdict.REPRODUCED


def _diverging(**diverged):
  """Returns cards of seeds that have diverged or not; of those that have, without a loss."""
  cards = _cards(**dict.fromkeys(diverged, BASE))
  for arm, lost in diverged.items():
    for seed, one in enumerate(lost):
      cards[arm][seed] = {"diverged": 1} if one else {**cards[arm][seed], "diverged": 0}
  return cards


def test_a_diverged_run_leaves_claims_about_losses_open():
  finding = judge(_claim(Expects.ABOVE), _diverging(a=(0, 1, 0), b=(0, 0, 0)))
  assert (finding.verdict, finding.measured) == (Verdict.INCONCLUSIVE, None)
  assert finding.why == "runs of a diverged"


@pytest.mark.parametrize(
  ("a", "b", "verdict"),
  [
    ((1, 1, 1), (0, 0, 0), Verdict.REPRODUCED),
    ((0, 1, 0), (0, 0, 0), Verdict.INCONCLUSIVE),
    ((1, 1, 1), (1, 1, 1), Verdict.NOT_REPRODUCED),
    ((0, 0, 0), (0, 0, 0), Verdict.NOT_TESTABLE),
  ],
)
def test_divergence_itself_is_a_metric(a, b, verdict):
  claim = _claim(
    Expects.ABOVE,
    0.5,
    Contrast("diverged", "a", "b"),
    requires=Requirement("diverged", ("a", "b"), "no run diverged"),
  )
  assert judge(claim, _diverging(a=a, b=b)).verdict == verdict


def test_no_difference_needs_a_margin():
  with pytest.raises(UserError, match="margin"):
    _claim(Expects.NO_DIFFERENCE)


def test_a_metric_that_cards_lack_is_named_with_the_nearest():
  statistic = Contrast("eval.lss", "a", "b")
  with pytest.raises(UserError, match="did you mean loss"):
    judge(_claim(Expects.ABOVE, statistic=statistic), _cards(a=BASE, b=BASE))


def test_names_within_a_metric_may_have_dots():
  card = {"arm": "a", "interventions": {"at_1.25": {"loss": 1.5}, "at_1": {"25": 2.0}}}
  assert metric(card, "interventions.at_1.25.loss") == 1.5
  with pytest.raises(UserError, match="no metric 'interventions.at_1.5.loss'"):
    metric(card, "interventions.at_1.5.loss")


def test_a_speedup_is_read_off_the_curves():
  def card(*losses):
    return {"curve": [[1000 * (i + 1), loss] for i, loss in enumerate(losses)]}

  cards = {
    "slow": [card(1.8, 1.6, 1.4, 1.2)] * 4,
    # In the middle of two evaluations; never; at the first; and past a bump that does not count.
    "fast": [card(1.5, 1.3, 1.1, 1.0), card(2.0, 1.9, 1.8, 1.7), card(1.1, 1.0, 0.9, 0.8)]
    + [card(1.6, 1.25, 1.9, 1.15)],
  }
  expected = [4000 / 2500, 1.0, 4.0, 4000 / 3500]
  assert Speedup("fast", "slow").values(cards) == pytest.approx(expected)
