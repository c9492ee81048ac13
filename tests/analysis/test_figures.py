"""The arithmetic behind the report's pictures and numbers."""

import math

import numpy as np
import pytest
from analysis.synthetic_run import write_metrics, write_run

from moe_jax.analysis import heatmap, panels, svg, text
from moe_jax.analysis.loss_figure import compressor_rules, draw_loss, smoothed
from moe_jax.analysis.run_folder import read_run


def test_compressor_lines_are_converted_with_tokens_per_byte(tmp_path):
  run = read_run(write_run(tmp_path, rows=20))
  # The synthetic run has 0.97 tokens for each byte.
  expected = [bits * math.log(2) / 0.97 for bits in (2.71, 2.33)]
  assert [rule.value for rule in compressor_rules(run)] == pytest.approx(expected)


def test_compressor_lines_need_the_ratio(tmp_path):
  write_metrics(tmp_path, [{"step": 1, "loss": 2.0, "eval_loss": 2.0}])
  assert compressor_rules(read_run(tmp_path)) == ()


def test_other_tokenizers_curve_is_drawn_in_this_runs_units(tmp_path):
  # 2 nats for each token of two bytes is 1 nat for each byte.
  rows = {
    "bytes": [{"step": 1, "eval_loss": 1.5, "eval_bits_per_byte": 1.5 / math.log(2)}],
    "pairs": [{"step": 1, "eval_loss": 2.0, "eval_bits_per_byte": 1.0 / math.log(2)}],
  }
  for name, lines in rows.items():
    write_metrics(tmp_path / name, lines)
  figure = draw_loss(read_run(tmp_path / "bytes"), None, [("pairs", read_run(tmp_path / "pairs"))])
  assert [label for _, label in figure.legend] == ["held-out 1.500", "pairs (held-out) 1.000"]


def test_smoothing_averages_neighbours_and_skips_nan():
  values = np.array([4.0, 1.0, np.nan, 3.0, 5.0, 7.0])
  # Window 3: the first row has no left neighbour, so it stays alone; the last keeps its left one.
  expected = [4.0, 2.5, np.nan, 4.0, 5.0, 6.0]
  np.testing.assert_allclose(smoothed(values, 3), expected)


def test_early_loss_above_the_frame_is_remarked(tmp_path):
  figure = draw_loss(read_run(write_run(tmp_path, rows=200)), None, [])
  assert any("above the frame" in remark for remark in figure.remarks)


@pytest.mark.parametrize(
  ("low", "high", "expected"),
  [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (1.2, 2.6, [1.5, 2, 2.5]), (-3, 3, [-2, 0, 2])],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
  ticks, _ = svg.nice_ticks(low, high, 4)
  assert ticks == pytest.approx(expected)


@pytest.mark.parametrize(
  ("value", "step", "expected"),
  [
    (0.25, 0.25, "0.25"),
    (2, 1, "2"),
    (2.5, 2.5, "2.5"),
    (12_000, 2000, "12 k"),
    (1.25e6, 5e4, "1.25 M"),
    (0, 0.1, "0"),
  ],
)
def test_tick_labels_have_the_decimals_they_need(value, step, expected):
  assert svg.tick_label(value, step) == expected


@pytest.mark.parametrize("values", [[], [np.nan], [0.0], [5.0, 5.0]])
def test_range_is_never_empty(values):
  low, high = svg.padded_range(values)
  assert low < high


def test_thinning_keeps_spikes_and_gaps():
  y = np.zeros(50_000)
  y[31_415], y[20_000:20_500] = 9.0, np.nan
  x, kept = svg.thin(np.arange(50_000.0), y)
  assert len(kept) < 1500
  assert kept[x == 31_415] == [9.0]
  assert np.isnan(kept).any()


def test_colours_are_clear_at_even_and_diverge():
  load = np.array([[0.25], [0.5], [0.0], [0.25]])
  colours = heatmap.load_colours(load, 2.0)
  assert colours[0, 0, 3] == 0
  assert tuple(colours[1, 0]) == (213, 94, 0, 255)
  assert tuple(colours[2, 0]) == (0, 114, 178, 255)


def test_resampling_averages_stretches_and_bridges_gaps():
  steps = np.array([0, 1, 2, 30])
  load = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8]])
  cells = heatmap.resample(steps, load, 3)
  np.testing.assert_allclose(cells, [[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]])


def test_ratio_limit_covers_most_cells_symmetrically():
  even = np.full((100, 4), 0.25)
  assert heatmap.ratio_limit([even]) == 1.25
  assert heatmap.ratio_limit([np.tile([0.75, 0.25 / 3, 0.25 / 3, 0.25 / 3], (9, 1))]) == 4


@pytest.mark.parametrize(
  ("load", "expected"),
  [([0.25] * 4, 1.0), ([1.0, 0, 0, 0], 0.0), ([0.5, 0.5, 0, 0], 0.5), ([1.0], 1.0)],
)
def test_load_entropy_is_relative_to_the_even_load(load, expected):
  assert panels.load_entropy(np.array([load])) == pytest.approx([expected])


@pytest.mark.parametrize(
  ("value", "expected"),
  [
    (999, "999"),
    (9_999, "9,999"),
    (40_873, "40.9 k"),
    (999_900, "1.00 M"),
    (3_412_608, "3.41 M"),
    (6.7e11, "670 B"),
    (None, "–"),
    (float("nan"), "–"),
  ],
)
def test_counts_are_compact(value, expected):
  assert text.compact(value) == expected


@pytest.mark.parametrize(
  ("seconds", "expected"),
  [
    (4.21, "4.2 s"),
    (59.9, "60 s"),
    (247.3, "4 min 07 s"),
    (7_500, "2 h 05 min"),
    (3e5, "3 d 11 h"),
  ],
)
def test_durations_use_two_units(seconds, expected):
  assert text.duration(seconds) == expected


@pytest.mark.parametrize(
  ("value", "expected"),
  [(0, "0"), (0.00123456, "0.00123"), (1.5e-7, "1.50e−7"), (-2.5, "−2.50"), (12345.6, "12,346")],
)
def test_significant_digits(value, expected):
  assert text.significant(value) == expected
