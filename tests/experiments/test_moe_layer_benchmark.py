"""The MoE layer benchmark runs and reports; how fast anything is, no test asserts."""

import contextlib
import io
import json

import pytest
from fast_compilation import compile_fast  # noqa: F401

from experiments.benchmarks import moe_layer, timing


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
  path = tmp_path_factory.mktemp("bench") / "figures.json"
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    moe_layer.main(["--tiny", "--rounds", "2", "--json", str(path)])
  return printed.getvalue(), json.loads(path.read_text())


def test_table_names_every_form_and_limit(tiny_run):
  table, _ = tiny_run
  rows = [line.split()[0] for line in table.splitlines() if line.strip()]
  assert {"limit_dense", "limit_batched", "einsum", "gather", "ragged"} <= set(rows)


def test_raw_figures_hold_every_round_and_positive_ratios(tiny_run):
  _, report = tiny_run
  rows = report["shapes"]["tiny"]
  assert [row["form"] for row in rows] == [
    "limit_dense",
    "limit_batched",
    "einsum",
    "einsum",
    "gather",
    "ragged",
    "ragged, no experts",
  ]
  for row in rows:
    assert len(row["forward_seconds"]) == len(row["backward_seconds"]) == 2
    assert all(value > 0 for pair in row["ratios"].values() for value in pair)
  assert rows[0]["ratios"]["forward_to_limit_dense"] == [1.0, 1.0]


def test_dropless_reports_no_drops_and_small_groups_do(tiny_run):
  _, report = tiny_run
  dropped = {row["label"]: row["dropped_fraction"] for row in report["shapes"]["tiny"]}
  assert dropped["ragged"] == 0.0
  assert dropped["einsum g16 cf1.25"] > 0.0


def test_report_says_where_it_was_measured(tiny_run):
  _, report = tiny_run
  assert all(report[key] for key in ("device", "jax", "commit", "date", "clock", "dtype"))


@pytest.mark.parametrize(
  ("flag", "value"),
  [("--shapes", "mixtrall"), ("--forms", "scatter"), ("--rounds", "0"), ("--clock", "sun")],
)
def test_unknown_choice_is_refused_by_name(flag, value, capsys):
  with pytest.raises(SystemExit) as stop:
    moe_layer.main([flag, value])
  assert stop.value.code == 2
  assert f"{value!r}" in capsys.readouterr().err


def test_ratio_takes_fastest_rounds_and_median_within_rounds():
  # The second round was twice as slow for both: no ratio within a round shows it.
  assert timing.ratio([3.0, 6.0, 4.5], [1.0, 2.0, 1.5]) == (3.0, 3.0)
  assert timing.ratio([2.0, 3.0, 8.0], [2.0, 1.0, 2.0]) == (2.0, 3.0)
