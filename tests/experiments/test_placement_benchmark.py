"""The placement benchmark runs and reports; how fast anything is, no test asserts."""

import contextlib
import io
import json

from fast_compilation import compile_fast  # noqa: F401

from experiments.benchmarks import placement


def test_table_and_figures_tell_what_balancing_predicts(tmp_path):
  path = tmp_path / "figures.json"
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    placement.main(["--tiny", "--rounds", "1", "--spare", "4", "--json", str(path)])
  born, moved, copied = json.loads(path.read_text()).values()
  assert born["load"] > moved["load"] > copied["load"] >= 1.0
  assert copied["predicted"] == born["load"] / copied["load"]
  # Half of a step is not experts.
  assert copied["step"] == (1 + born["load"]) / (1 + copied["load"])
  assert all(len(case["milliseconds"]) == 4 for case in (born, moved, copied))
  assert "4 copies" in printed.getvalue()


def test_no_row_is_lost_by_placement():
  setting = placement.Setting()
  loads = placement.zipf_rows(setting, 1.0)
  for spare in (None, 0, 16):
    rows = placement.placed_rows(setting, loads, spare)
    assert rows.shape == (8, 8 + (spare or 0) // 8)
    # Copies share whole rows: each may leave one over.
    assert loads.sum() - rows.size <= rows.sum() <= loads.sum()
