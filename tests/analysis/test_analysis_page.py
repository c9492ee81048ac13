"""The page of `moe-jax analyze`: every part is there, nothing of a text reaches it as HTML."""

import html
import re

import numpy as np
import pytest

from moe_jax.analysis.analysis_page import AnalysisResults, render, sections
from moe_jax.analysis.page import Inset
from moe_jax.analysis.routing_measures import Measure


def results(experts: int, top_k: int, steps=(2, 4)) -> AnalysisResults:
  rng = np.random.default_rng(0)
  shares = rng.random((2, experts))
  pairs = rng.random((experts, experts))
  measures = [Measure("load_entropy", 0, 0.9, 1.0), Measure("path_diversity", None, 0.1, None)]
  measures += [Measure("saturation", 0, step / 4, 0.25, step) for step in steps]
  return AnalysisResults(
    run="<run>",
    step=4,
    tokens=1234,
    domains=("<a>", "b"),
    measures=measures,
    shares=[shares],
    pairs=[pairs] if top_k > 1 else [],
    losses={"the model as it is": 2.0, "<worse>": 2.5, "better": 1.75},
    tops=[[["<b>", "x"], *([] for _ in range(experts - 1))]],
  )


def test_the_page_shows_all_parts():
  text = render(results(experts=4, top_k=2))
  for part in ("Measures", "Who reads what", "Who works together", "Over training", "+0.5000"):
    assert part in text
  assert "−0.2500" in text or "-0.2500" in text
  assert "<run>" not in text and "<a>" not in text and "<worse>" not in text and "<b>" not in text
  # 2 texts and 4 experts by 4.
  assert text.count("<rect") == 8 + 16


@pytest.mark.parametrize(("top_k", "steps"), [(1, (2, 4)), (2, ())])
def test_parts_without_content_are_left_out(top_k, steps):
  text = render(results(4, top_k, steps))
  assert ("Who works together" in text) == (top_k > 1)
  assert ("Over training" in text) == bool(steps)


def test_many_experts_are_drawn_in_part():
  text = render(results(experts=100, top_k=2))
  assert text.count("<rect") == 2 * 64 and "up to 64 experts" in text


def test_the_page_is_its_sections():
  found = results(experts=4, top_k=1)
  parts = sections(found)
  assert list(parts) == [
    "Measures",
    "Who reads what",
    "Words of the experts",
    "Over training",
    "What it is worth",
  ]
  assert all(part in render(found) for part in parts.values())


def test_a_notebook_shows_a_page_in_a_frame_of_its_own():
  shown = Inset('<p class="x">&amp;</p>', height=120)._repr_html_()
  assert shown.startswith("<iframe ") and 'height="120"' in shown
  assert html.unescape(re.search('srcdoc="([^"]*)"', shown)[1]) == '<p class="x">&amp;</p>'
