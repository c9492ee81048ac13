"""Paths across layers."""

import math

import numpy as np
import pytest

from moe_jax.analysis.router_metrics import paths
from moe_jax.errors import UserError


def test_hand_solved_paths():
  # Three layers, five tokens, the last one padding: paths 012, 012, 011, 112.
  firsts = np.array([[0, 0, 0, 1, 7], [1, 1, 1, 1, 7], [2, 2, 1, 2, 7]])
  mask = np.array([True] * 4 + [False])
  counts = paths.path_counts(firsts, mask)
  assert sorted(counts) == [1, 1, 2]
  assert paths.path_diversity(counts) == 3 / 4
  np.testing.assert_allclose(paths.path_entropy(counts), 1.5 * math.log(2))


def test_random_paths_show_the_expected_diversity():
  firsts = np.random.default_rng(0).integers(0, 4, (3, 200))
  found = paths.path_diversity(paths.path_counts(firsts))
  # 61.3 of 64 paths are expected, with a standard deviation of about 1.5.
  np.testing.assert_allclose(found, paths.expected_path_diversity(200, 4, 3), atol=6 / 200)


@pytest.mark.parametrize(
  ("tokens", "experts", "layers", "expected"),
  [(10, 1, 5, 0.1), (1, 8, 2, 1.0), (2, 2, 1, 0.75), (1000, 256, 200, 1.0)],
)
def test_expected_diversity_in_closed_cases(tokens, experts, layers, expected):
  np.testing.assert_allclose(paths.expected_path_diversity(tokens, experts, layers), expected)


def test_a_layer_that_copies_the_one_before_tells_everything():
  first = np.tile(np.arange(4), 10)
  transitions = paths.transition_counts(np.stack([first, first, (first + 1) % 4]), 4)
  np.testing.assert_array_equal(transitions[0], 10 * np.eye(4))
  information = paths.cross_layer_information(transitions)
  np.testing.assert_allclose(information, [math.log(4)] * 2, rtol=1e-6)


def test_unrelated_layers_show_the_bias_alone():
  firsts = np.random.default_rng(0).integers(0, 4, (40, 500))
  information = paths.cross_layer_information(paths.transition_counts(firsts, 4))
  # 39 chi-square draws with 9 degrees: relative standard error 7.5 %.
  expected = paths.expected_cross_layer_information(500, 4)
  np.testing.assert_allclose(np.mean(information), expected, rtol=0.25)


def test_padding_is_in_no_transition_and_one_layer_has_none():
  firsts = np.array([[0, 9], [1, 9]])
  transitions = paths.transition_counts(firsts, 2, np.array([True, False]))
  np.testing.assert_array_equal(transitions, [[[0, 1], [0, 0]]])
  with pytest.raises(UserError, match="holds 1 layers"):
    paths.transition_counts(firsts[:1], 2)
