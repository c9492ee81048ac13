"""Without a terminal, progress is a line now and then that tells how long it will take."""

import pytest

from moe_jax.data import progress


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def _lines(capsys, clock, total, places, lines=True):
  shown = progress.PreparationProgress("texts/", total, lines=lines)
  for number, done in enumerate(places, start=1):
    clock[0] += 10
    shown.update(done, 20_000_000 * number)
  shown.close()
  return capsys.readouterr().err.splitlines()


def test_lines_tell_share_speed_and_what_is_left(capsys, clock):
  # 10 units in 10 seconds, after 40 that a process before this one had read.
  assert _lines(capsys, clock, 120, [40, 50, 60]) == [
    "texts/: 33% read, 2.0 MB/s",
    "texts/: 42% read, 2.0 MB/s, 0:01:10 left",
    "texts/: 50% read, 2.0 MB/s, 0:01:00 left",
  ]


def test_a_source_of_unknown_size_tells_how_far_it_is(capsys, clock):
  assert _lines(capsys, clock, 0, [7]) == ["texts/: 7 read, 2.0 MB/s"]


def test_what_is_made_on_the_way_is_silent(capsys, clock):
  assert _lines(capsys, clock, 120, [40], lines=False) == []
