"""Whether the seeds of a sweep train faster as one vmapped program than one after another.

  taskset -c 0 python -m experiments.benchmarks.vmapped_seeds [--seeds 3] [--rounds 15]

On one core, as `moe-jax sweep` gives each run. CPU time of a step of all seeds, medians over rounds
in which both take turns; the arms are those of experiments/router_zoo that are named.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.data.builders import prepare
from moe_jax.sweep.recipe import Profile, load_recipe
from moe_jax.training.config import ExperimentConfig, experiment_from
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import TrainState, init_state
from moe_jax.training.step import make_train_step
from moe_jax.training.stream import training_batches

_RECIPE = "experiments/router_zoo/config.py"


def main() -> None:
  """Prints a row for each arm."""
  args = _arguments()
  configs = {run.arm: run.mapping() for run in load_recipe(_RECIPE).runs(Profile.FULL)}
  print(f"{'arm':<16}{'one by one ms':>14}{'vmapped ms':>12}{'ratio':>8}")
  for arm in args.arms.split(","):
    apart, together = measure(experiment_from(configs[arm]), args.seeds, args.rounds)
    print(f"{arm:<16}{apart:>14.1f}{together:>12.1f}{together / apart:>8.2f}", flush=True)


def measure(config: ExperimentConfig, seeds: int, rounds: int) -> tuple[float, float]:
  """Returns the milliseconds of a step of all seeds, one after another and vmapped."""
  optimizer = make_optimizer(config.optimizer, config.steps)
  step = make_train_step(config, optimizer)
  vmapped = jax.jit(jax.vmap(step.__wrapped__, in_axes=(0, None)), donate_argnums=0)
  batch = next(iter(training_batches(config, prepare(config.data))))

  def states() -> list[TrainState]:
    return [init_state(config.model, optimizer, seed) for seed in range(seeds)]

  apart, together = states(), jax.tree.map(lambda *each: jnp.stack(each), *states())

  def one_by_one() -> None:
    apart[:] = [step(state, batch)[0] for state in apart]
    jax.block_until_ready(apart)

  def at_once() -> None:
    nonlocal together
    together = jax.block_until_ready(vmapped(together, batch)[0])

  one_by_one()
  at_once()
  times = [(_milliseconds(one_by_one), _milliseconds(at_once)) for _ in range(rounds)]
  return tuple(map(statistics.median, zip(*times, strict=True)))


def _milliseconds(call: Callable[[], None]) -> float:
  started = time.process_time()
  call()
  return 1000 * (time.process_time() - started)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--arms", default="dense,top1,top2_halves,expert_choice")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--rounds", type=int, default=15)
  return parser.parse_args()


if __name__ == "__main__":
  main()
