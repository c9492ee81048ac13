"""The MoE layer on eight devices against the same layer on one."""

import time

import pytest
from moe.pairwise import pairwise_rows
from sharding.layer_on_a_mesh import (
  FACTORS,
  PATHS,
  all_rows,
  applies,
  assert_close,
  counts,
  layer_config,
  run,
  run_alone,
)
from sharding.meshes import mesh_layout

ROWS = pairwise_rows(FACTORS, applies)


# Every other combination that goes together.
REST = [row for row in all_rows(FACTORS, applies) if row not in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.values()))
def test_a_mesh_changes_no_output_gradient_loss_metric_or_drop(row):
  _check(row)


@pytest.mark.full
@pytest.mark.parametrize("mesh", FACTORS["mesh"])
@pytest.mark.parametrize("path", FACTORS["path"])
def test_a_mesh_changes_nothing_in_any_combination(path, mesh, record_property):
  started, failures = time.process_time(), []
  rows = [row for row in REST if (row["path"], row["mesh"]) == (path, mesh)]
  for row in rows:
    try:
      _check(row)
    except AssertionError as error:
      failures.append(f"{row['preset']}: {error}")
  record_property("configs", len(rows))
  record_property("inputs", len(rows))
  record_property("cpu_seconds", time.process_time() - started)
  assert not failures, "\n".join(failures)


def _check(row):
  dispatch, fields = PATHS[row["path"]]
  got = run(layer_config(row["preset"], dispatch), mesh_layout(row["mesh"], **fields))
  want = run_alone(row["preset"], dispatch)
  assert_close(got, want)
  # The slots of Soft MoE count fractions of tokens.
  if row["preset"] != "soft_moe":
    assert counts(got) == counts(want)
