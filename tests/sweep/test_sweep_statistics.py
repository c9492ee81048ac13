"""Intervals over seeds against scipy's tests and closed forms."""

import math

import numpy as np
import pytest
import scipy.stats

from moe_jax.sweep.statistics import (
  Interval,
  equivalence_interval,
  interval,
  pooled_deviation,
  seeds_to_reach,
)

VALUES = [0.011, -0.002, 0.017, 0.008]


def test_interval_is_that_of_students_test():
  found = interval(VALUES)
  expected = scipy.stats.ttest_1samp(VALUES, 0.0).confidence_interval(0.95)
  assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
  assert found.n == 4
  # Of three values by hand: t(0.975, 2) = 4.302653.
  assert interval([1.0, 2.0, 3.0]).half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_seed_has_no_bound_and_equal_values_are_a_point():
  assert interval([1.5]).half_width == math.inf
  assert interval([1.0, 1.0, 1.0]).half_width == 0


def test_equivalence_interval_is_two_one_sided_tests_at_5_percent():
  """A bound at either end of the interval is accepted by a one-sided test at exactly p = 0.05."""
  found = equivalence_interval(VALUES)
  above = scipy.stats.ttest_1samp(VALUES, found.low, alternative="greater")
  below = scipy.stats.ttest_1samp(VALUES, found.high, alternative="less")
  assert above.pvalue == pytest.approx(0.05, rel=1e-9)
  assert below.pvalue == pytest.approx(0.05, rel=1e-9)


def test_pooled_deviation_is_the_root_of_the_mean_variance():
  a, b = [1.0, 2.0, 3.0], [5.0, 9.0, 13.0]
  assert pooled_deviation(a, b) == pytest.approx(math.sqrt((1 + 16) / 2))
  assert pooled_deviation([1.0], [2.0]) == 0


def test_seeds_to_reach_is_the_smallest_that_does():
  n = seeds_to_reach(0.01, 0.005)
  width = [interval(_of_spread(0.01, count)).half_width for count in (n - 1, n)]
  assert width[1] < 0.005 <= width[0]
  assert seeds_to_reach(1.0, 1e-9) is None


def _of_spread(spread, count):
  values = np.linspace(-1, 1, count)
  return list(values / values.std(ddof=1) * spread)


def test_intervals_are_said_in_as_many_digits_as_they_need():
  assert str(Interval(1.23456, 0.012345, 3)) == "1.2346 ± 0.0123"
  assert str(Interval(-1.23e-6, 4.56e-7, 3)) == "-1.2e-06 ± 4.6e-07"
  assert str(Interval(6.7e-5, 0.0371, 3)) == "0.0001 ± 0.0371"
  assert str(Interval(0.0, 0.0, 3)) == "0.0000 ± 0.0000"
  assert str(interval([1.5])) == "1.5000 (one seed)"
