"""What the pages say of full-size models on pods is what the stored plans say."""

from experiments.pods import table
from experiments.pods.cases import CASES


def test_both_pages_are_made_of_the_stored_plans():
  assert table.README.read_text() == table.page()
  readme = table.PROJECT_README.read_text()
  assert readme == table.with_table(readme)


def test_every_case_has_a_plan_that_fits_and_its_row():
  for case in CASES:
    plan = table.load(case)["printed"]
    assert plan["peak_bytes"] < plan["hbm_bytes"], case.name
    assert f"| {case.name} | {plan['topology']} (" in table.page()
