"""What reading the data costs a training step of the quickstart.

  python -m experiments.benchmarks.data_reading [--rounds 15] [--steps 20] [FIELD=VALUE ...]

In rounds, in one process: so many training steps on one batch, then ten times as many batches read
and thrown away. Reading is charged all its CPU time, of its threads too, although it runs beside
the steps; a step is charged its wall time and, in the other column, the CPU time of all its cores.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable

import jax

from moe_jax.config.load import load_config, override
from moe_jax.data.builders import prepare
from moe_jax.training.config import ExperimentConfig, experiment_from
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step
from moe_jax.training.stream import training_batches

_CONFIG = "configs/quickstart.py"
_BATCHES_A_STEP = 10


@dataclasses.dataclass(frozen=True)
class Cost:
  """Milliseconds of one call."""

  wall: float
  cpu: float


def cost(call: Callable[[], None], times: int) -> Cost:
  """Returns what a call costs, over so many of them."""
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in range(times):
    call()
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return Cost(1000 * wall / times, 1000 * cpu / times)


def measure(config: ExperimentConfig, rounds: int, steps: int) -> list[tuple[Cost, Cost]]:
  """Returns the cost of a step and of a batch in each round."""
  batches = training_batches(config, prepare(config.data))
  optimizer = make_optimizer(config.optimizer, config.steps)
  train_step = make_train_step(config, optimizer)
  state, batch = init_state(config.model, optimizer, config.seed), next(batches)

  def step() -> None:
    nonlocal state
    state, _ = train_step(state, batch)
    jax.block_until_ready(state)

  step()
  return [
    (cost(step, steps), cost(lambda: next(batches), _BATCHES_A_STEP * steps)) for _ in range(rounds)
  ]


def main() -> None:
  """Prints the medians over the rounds."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("override", nargs="*", metavar="FIELD=VALUE")
  args = parser.parse_args()
  config = load_config(_CONFIG)
  for each in args.override:
    override(config, *each.split("=", 1))
  found = measure(experiment_from(config.to_dict()), args.rounds, args.steps)
  figures = {
    "step, wall ms": [step.wall for step, _ in found],
    "step, CPU ms": [step.cpu for step, _ in found],
    "batch, CPU ms": [batch.cpu for _, batch in found],
    "batch CPU / step wall, %": [100 * batch.cpu / step.wall for step, batch in found],
    "batch CPU / step CPU, %": [100 * batch.cpu / step.cpu for step, batch in found],
  }
  for name, values in figures.items():
    low, *_, high = sorted(values)
    print(f"{name:<26}{statistics.median(values):8.2f}   ({low:.2f} to {high:.2f})")
  print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
  main()
