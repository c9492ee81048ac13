"""The table of the upcycling experiment: from its committed results, and paired by seed."""

import json

from training import tiny

from experiments.upcycled_quickstart.compare import ARMS, RUN, table

FOLDER = tiny.ROOT / "experiments/upcycled_quickstart"


def arm(end):
  fields = dict(parameters=10, active_parameters=5, flops_per_token=2e6)
  return {"branch": [2.0] * len(end), "end": end, **fields}


def test_differences_are_paired_by_seed():
  rows = table({"dense": arm([1.0, 3.0]), "copy": arm([0.5, 2.5])}).splitlines()
  assert rows[-1].startswith("| copy | 2.0000 ± 0.0000 | 1.5000 ± 1.4142 | 0.5000 ± 0.0000 |")
  assert "10 / 5 | 2.00 M" in rows[-1]


def test_the_readme_has_the_table_of_the_committed_results():
  text = (FOLDER / "README.md").read_text()
  for name in ("results.json", "variants.json"):
    results = json.loads((FOLDER / name).read_text())
    assert set(results) <= {"dense", *ARMS}
    assert table(results) in text


def test_the_branch_is_a_checkpoint_of_the_dense_run():
  fields = dict(each.split("=") for each in RUN)
  assert int(fields["checkpoint.every"]) == 1000 < int(fields["steps"])
