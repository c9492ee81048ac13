"""The benchmark of vmapped seeds: both ways train all seeds."""

from fast_compilation import compile_fast  # noqa: F401
from training import tiny

from experiments.benchmarks.vmapped_seeds import measure


def test_both_ways_take_time():
  config = tiny.experiment("moe", moe__dispatch="gather", model__scan_unroll=1)
  assert all(milliseconds > 0 for milliseconds in measure(config, seeds=2, rounds=1))
