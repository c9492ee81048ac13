"""Interleaved timing: rounds that run every case once, so that a slow minute hits all alike."""

import argparse
import dataclasses
import enum
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax


class Clock(enum.StrEnum):
  """What a duration counts."""

  WALL = "wall"
  PROCESS = "process"  # CPU time of all threads: steadier than wall time on a busy machine


_NOW = {Clock.WALL: time.perf_counter, Clock.PROCESS: time.process_time}


def add_clock(parser: argparse.ArgumentParser) -> None:
  """Adds the flag --clock."""
  parser.add_argument(
    "--clock",
    type=Clock,
    choices=list(Clock),
    default=Clock.WALL,
    help="what a second is (default: wall)",
  )


def integers(text: str) -> list[int]:
  """Reads a flag's comma-separated numbers."""
  return [int(part) for part in text.split(",")]


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled function, ready to be timed.

  temp_bytes: temporary memory of one call beyond arguments and results, as XLA planned it; None
    where no compiler says.
  """

  run: Callable[..., Any]
  args: tuple[Any, ...]
  temp_bytes: int | None


def compile_program(fn: Callable[..., Any], *args: Any) -> Program:
  """Compiles fn for these arguments and calls it once, so that no first-call cost is timed."""
  compiled = jax.jit(fn).lower(*args).compile()
  jax.block_until_ready(compiled(*args))
  return Program(compiled, args, compiled.memory_analysis().temp_size_in_bytes)


def time_once(program: Program, clock: Clock) -> float:
  """Returns the seconds of one call, until its last result is there."""
  start = _NOW[clock]()
  jax.block_until_ready(program.run(*program.args))
  return _NOW[clock]() - start


def time_interleaved(
  programs: Sequence[Program],
  rounds: Sequence[int],
  clock: Clock,
  on_round: Callable[[int], None],
) -> list[list[float]]:
  """Returns the seconds of each program, one entry a round.

  Args:
    programs: run in turn in every round.
    rounds: how many rounds each program takes part in, from the first.
    clock: what to count.
    on_round: called with the index of each round before it starts.
  """
  seconds = [[] for _ in programs]
  for index in range(max(rounds)):
    on_round(index)
    for program, wanted, taken in zip(programs, rounds, seconds, strict=True):
      if index < wanted:
        taken.append(time_once(program, clock))
  return seconds


def ratio(seconds: Sequence[float], limit: Sequence[float]) -> tuple[float, float]:
  """Returns the ratio of the fastest rounds, and the median of the ratios within a round."""
  within = [a / b for a, b in zip(seconds, limit, strict=False)]
  return min(seconds) / min(limit), statistics.median(within)
