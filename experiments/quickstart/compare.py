"""Trains the quickstart and its dense variant over seeds and compares them.

  python -m experiments.quickstart.compare --workdir=runs/compare [--seeds=0,1,2] [FIELD=VALUE ...]

Writes results.json (both curves, step times) and dense_baseline.json (the curve that the report
draws) into --out, and prints the table. A run that is there already is not trained again.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax

from moe_jax.cli import main as moe_jax
from moe_jax.config.load import load_config, override
from moe_jax.data.builders import prepare
from moe_jax.planning.count import count_parameters
from moe_jax.planning.flops import training_flops_per_token
from moe_jax.training.config import ExperimentConfig, experiment_from
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.run_folder import METRICS_FILE
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step
from moe_jax.training.stream import training_batches

CONFIG = "configs/quickstart.py"
VARIANTS = ("moe", "dense")
_HERE = Path(__file__).parent


def main() -> None:
  """Runs the comparison."""
  args = _arguments()
  seeds = [int(seed) for seed in args.seeds.split(",")]
  for seed in seeds:
    for variant in VARIANTS:
      _train(variant, seed, args.workdir, args.override)
  results = {variant: _curve(variant, seeds, args.workdir, args.override) for variant in VARIANTS}
  results["step_time"] = step_times(args.override, args.rounds)
  args.out.mkdir(parents=True, exist_ok=True)
  _write(args.out / "results.json", results)
  _write(args.out / "dense_baseline.json", baseline(results["dense"]))
  print(table(results))


def step_times(overrides: list[str], rounds: int) -> dict[str, float]:
  """Times training steps of both variants in turn, in one process.

  Returns:
    Median seconds a step of each variant, and `ratio`: the median over rounds of MoE / dense.
  """
  runs = {variant: _stepper(_experiment(variant, 0, overrides)) for variant in VARIANTS}
  seconds = {variant: [] for variant in VARIANTS}
  for _ in range(rounds):
    for variant, run in runs.items():
      seconds[variant].append(run())
  ratios = [a / b for a, b in zip(seconds["moe"], seconds["dense"], strict=True)]
  medians = {variant: statistics.median(times) for variant, times in seconds.items()}
  return {**medians, "ratio": statistics.median(ratios)}


def baseline(dense: dict) -> dict:
  """Returns the dense curve in the form that the report reads."""
  return {
    "name": "dense, same active FLOPs",
    "seeds": len(dense["seeds"]),
    "points": dense["points"],
    "note": "Recorded runs of configs/quickstart.py:dense.",
  }


def table(results: dict) -> str:
  """Returns the Markdown table of the README."""
  rows = [
    "| | held-out nats per token | bits per byte | parameters total / active |"
    " FLOPs per token | step time |",
    "|---|---|---|---|---|---|",
  ]
  for variant in VARIANTS:
    r = results[variant]
    nats, bits = r["eval_loss"], r["eval_bits_per_byte"]
    rows.append(
      f"| {variant} | {_mean_spread(nats)} | {_mean_spread(bits)} |"
      f" {r['parameters']:,} / {r['active_parameters']:,} | {r['flops_per_token'] / 1e6:.2f} M |"
      f" {(results['step_time']['ratio'] if variant == 'moe' else 1.0):.2f} |"
    )
  gaps = [
    d - m for d, m in zip(results["dense"]["eval_loss"], results["moe"]["eval_loss"], strict=True)
  ]
  rows.append(f"\nDense minus MoE at the last step, paired by seed: {_mean_spread(gaps)} nats.")
  return "\n".join(rows)


def _mean_spread(values: list[float]) -> str:
  spread = statistics.stdev(values) if len(values) > 1 else float("nan")
  return f"{statistics.mean(values):.4f} ± {spread:.4f}"


def _train(variant: str, seed: int, workdir: Path, overrides: list[str]) -> None:
  status = moe_jax(
    [
      "train",
      f"--config={CONFIG}:{variant}",
      f"--config.seed={seed}",
      f"--workdir={workdir / f'{variant}_{seed}'}",
      *(f"--config.{each}" for each in overrides),
    ]
  )
  if status:
    raise SystemExit(status)


def _experiment(variant: str, seed: int, overrides: list[str]) -> ExperimentConfig:
  config = load_config(f"{CONFIG}:{variant}")
  for each in (f"seed={seed}", *overrides):
    override(config, *each.split("=", 1))
  return experiment_from(config.to_dict())


def _stepper(config: ExperimentConfig):
  """Returns a function that runs one compiled step and returns its seconds."""
  data = prepare(config.data)
  batches = training_batches(config, data)
  optimizer = make_optimizer(config.optimizer, config.steps)
  step = make_train_step(config, optimizer)
  state = init_state(config.model, optimizer, config.seed)

  def run() -> float:
    nonlocal state
    batch = next(batches)
    started = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - started

  run()
  return run


def _curve(variant: str, seeds: list[int], workdir: Path, overrides: list[str]) -> dict:
  """Reads the evaluations of all seeds of a variant."""
  evaluations = []
  for seed in seeds:
    lines = (workdir / f"{variant}_{seed}" / METRICS_FILE).read_text().splitlines()
    evaluations.append([row for row in map(json.loads, lines) if "eval_loss" in row])
  points = []
  for rows in zip(*evaluations, strict=True):
    losses = [row["eval_loss"] for row in rows]
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    points.append([rows[0]["step"], statistics.mean(losses), spread])
  config = _experiment(variant, seeds[0], overrides)
  count = count_parameters(config.model)
  return {
    "seeds": seeds,
    "points": points,
    "eval_loss": [rows[-1]["eval_loss"] for rows in evaluations],
    "eval_bits_per_byte": [rows[-1]["eval_bits_per_byte"] for rows in evaluations],
    "parameters": count.total,
    "active_parameters": count.active,
    "flops_per_token": training_flops_per_token(config.model, config.data.sequence_length),
    "tokens": evaluations[0][-1]["tokens"],
  }


def _write(path: Path, value) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=Path, default=Path("runs/compare"))
  parser.add_argument("--out", type=Path, default=_HERE)
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--rounds", type=int, default=40, help="timed steps a variant")
  parser.add_argument("override", nargs="*", help="config overrides such as steps=100")
  return parser.parse_args()


if __name__ == "__main__":
  main()
