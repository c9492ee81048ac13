"""Printed and exact counts: every published size has its row, every difference its remark."""

import json
import re

import pytest
from training import tiny

from moe_jax.errors import UserError
from moe_jax.sweep.printed_sizes import Figure, agrees, convention, count, load_sizes, size_rows

SIZES = load_sizes(str(tiny.ROOT / "experiments/published_sizes/sizes.py"))
FIGURES, CLAIMS = SIZES.figures, SIZES.wrong


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_a_printed_figure_that_disagrees_has_a_remark(figure, monkeypatch):
  monkeypatch.chdir(tiny.ROOT)
  exact = count(figure.config)
  if not (agrees(exact.total, figure.total) and convention(exact, figure.active)):
    assert figure.note


def test_every_published_size_has_a_row():
  rows = {figure.config for figure in FIGURES}
  counted = json.loads((tiny.ROOT / "tests/fixtures/published_parameters.json").read_text())
  assert set(counted["models"]) <= rows
  for path in (tiny.ROOT / "configs").glob("*.py"):
    variants = re.findall(rf"^  configs/{path.name}:(\w+)", path.read_text(), flags=re.M)
    if "tiny" in variants:
      published = {v for v in variants if not v.startswith("tiny")}
      assert {f"configs/{path.name}:{v}" for v in published} <= rows


def test_figures_agree_when_they_round_to_the_printed_digits():
  assert agrees(46_702_792_704, "46.7B") and agrees(1_161_756_418_048, "1.2T")
  assert agrees(152_296_704, "152M") and not agrees(152_296_704, "145M")
  assert not agrees(37_552_282_624, "37B")


def test_a_printed_figure_without_a_unit_is_refused():
  with pytest.raises(UserError, match="the printed count '46.7' of Mixtral is none; expected"):
    Figure("Mixtral", "configs/mixtral.py:8x7b", "46.7", None)


def test_the_known_errors_are_named():
  text = " ".join(claim.text for claim in CLAIMS)
  for wrong in ("8x7B has 56B", "8x7B has 1.7T", "8x22B has 176B", "32E has 20B"):
    assert wrong in text


def test_rows_of_results_have_the_nearest_convention(monkeypatch):
  monkeypatch.chdir(tiny.ROOT)
  rows = {tuple(row[:2]): row[2:] for row in size_rows(FIGURES)}
  assert rows["Mixtral 8x7B", "total"][:4] == [
    "46.7B",
    "46,702,792,704",
    "+0.01 %",
    "**REPRODUCED**",
  ]
  # Without the input embedding; 37.6 B with it.
  assert rows["DeepSeek-V3", "active"][1:4] == ["36,625,603,584", "-1.01 %", "**REPRODUCED**"]
  assert rows["GLaM 1.7B/32E", "total"][2:4] == ["-30.21 %", "**NOT REPRODUCED**"]
  assert ("Switch-C", "active") not in rows
