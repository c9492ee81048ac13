"""A preparation that SIGKILL ends anywhere is continued, and leaves the same files."""

import random

import pytest
from data.killing_preparation import files_of, kill_at_any_time, kill_at_call, undisturbed
from data.texts import TEXTS, json_lines


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("texts")
  for i in range(4):
    (folder / f"{i}.jsonl").write_bytes(json_lines([text * 3 for text in TEXTS]))
  return folder


def test_three_kills_leave_the_files_of_an_undisturbed_preparation(source, tmp_path):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  calls, seconds = undisturbed(source, whole)
  expected = files_of(whole)
  assert len(expected) > 8  # Several shards of each split, the texts and the manifest.
  # Among batches and shards, then near the end, then wherever it is.
  assert kill_at_call(source, killed, calls // 3)
  assert kill_at_call(source, killed, calls // 2)
  assert set(files_of(killed)) != set(expected)
  kill_at_any_time(source, killed, random.Random(0), seconds / 4)
  undisturbed(source, killed)
  assert files_of(killed) == expected
