"""The summary of the tests marked `full` adds results up, and keeps those of earlier runs."""

import types

from full_report import FullReport

ROUTING = "tests/moe/test_routing_product.py::test_route[{}]"


def finish(report, name, outcome, **properties):
  """Tells the plugin that a test is over."""
  one = types.SimpleNamespace(when="call", keywords={"full": 1}, skipped=False, nodeid=name)
  one.outcome, one.user_properties = outcome, list(properties.items())
  one.failed, one.longrepr = outcome == "failed", "why"
  report.pytest_runtest_logreport(one)


def rows(folder):
  """Returns the table's rows without their header and their commit."""
  lines = (folder / "FULL.md").read_text().splitlines()
  table = [line.strip("| ").split(" | ")[:-1] for line in lines if line.startswith("|")]
  return table[2:]


def test_results_are_added_up_by_part_and_replaced_by_later_ones(tmp_path):
  report = FullReport(tmp_path)
  finish(report, ROUTING.format("top_k-raw"), "failed", configs=5, inputs=40, cpu_seconds=2.4)
  finish(report, ROUTING.format("top_k-hard"), "passed", configs=7, inputs=60, cpu_seconds=3.0)
  finish(report, ROUTING.format("hash-raw"), "failed")
  assert rows(tmp_path) == [
    ["test_routing_product", "hash", "0", "0", "0", "1", "0"],
    ["test_routing_product", "top_k", "12", "100", "1", "1", "5"],
  ]
  finish(
    FullReport(tmp_path), ROUTING.format("top_k-raw"), "passed", configs=6, inputs=1, cpu_seconds=1
  )
  assert rows(tmp_path)[1] == ["test_routing_product", "top_k", "13", "61", "2", "0", "4"]


def test_tests_that_are_not_exhaustive_are_left_out(tmp_path):
  plain = types.SimpleNamespace(when="call", keywords={}, skipped=False)
  FullReport(tmp_path).pytest_runtest_logreport(plain)
  assert not list(tmp_path.iterdir())
