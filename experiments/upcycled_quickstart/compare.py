"""Upcycles the dense quickstart and trains it on, against the dense model trained on.

  python -m experiments.upcycled_quickstart.compare --workdir=runs/upcycled_quickstart
    [--seeds=0,1,2] [FIELD=VALUE ...]

Writes results.json into --out and prints the table. A run that is there already is not trained
again, and one that was interrupted goes on. FIELD=VALUE changes the config of the dense run.
"""

import argparse
import json
import statistics
from pathlib import Path

from moe_jax.cli import main as moe_jax
from moe_jax.commands.surgery_target import NOTE_FILE
from moe_jax.planning.count import count_parameters
from moe_jax.planning.flops import training_flops_per_token
from moe_jax.training.run_folder import METRICS_FILE
from moe_jax.training.saved_run import load_experiment

CONFIG = "configs/quickstart.py:dense"
# What is upcycled is the checkpoint before the last one, 200 steps before the end.
RUN = ("steps=1200", "checkpoint.every=1000", "eval.every=100", "eval.batch_size=64")
ARMS = {
  "copy": ("--preset=mixtral", "--num_experts=8"),
  "parts": (
    *("--preset=mixtral", "--num_experts=16", "--top_k=2"),
    *("--parts=2", "--router=virtual_groups"),
  ),
  "reinit": ("--preset=mixtral", "--num_experts=8", "--reinit=0.5"),
  "switch": ("--preset=switch", "--num_experts=8"),
}
_HERE = Path(__file__).parent


def main() -> None:
  """Runs the comparison."""
  args = _arguments()
  seeds, arms = [int(seed) for seed in args.seeds.split(",")], args.arms.split(",")
  for seed in seeds:
    dense = _train_dense(seed, args)
    for arm in arms:
      _upcycle_and_train(arm, seed, dense, args)
  results = {arm: _results(arm, seeds, args.workdir) for arm in ("dense", *arms)}
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
  print(table(results))


def table(results: dict) -> str:
  """Returns the Markdown table of the README; differences are paired by seed."""
  rows = [
    "| | loss at the branch | held-out nats per token at the end | dense minus this |"
    " parameters total / active | FLOPs per token |",
    "|---|---|---|---|---|---|",
  ]
  dense = results["dense"]["end"]
  for arm, r in results.items():
    gaps = [d - own for d, own in zip(dense, r["end"], strict=True)]
    rows.append(
      f"| {arm} | {_mean_spread(r['branch'])} | {_mean_spread(r['end'])} |"
      f" {'' if arm == 'dense' else _mean_spread(gaps)} |"
      f" {r['parameters']:,} / {r['active_parameters']:,} | {r['flops_per_token'] / 1e6:.2f} M |"
    )
  return "\n".join(rows)


def _mean_spread(values: list[float]) -> str:
  if len(values) == 1:
    return f"{values[0]:.4f}"
  return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def _train_dense(seed: int, args: argparse.Namespace) -> Path:
  folder = args.workdir / f"dense_{seed}"
  overrides = (*RUN, f"seed={seed}", *args.override)
  _run(
    "train",
    f"--config={CONFIG}",
    f"--workdir={folder}",
    *(f"--config.{each}" for each in overrides),
  )
  return folder


def _upcycle_and_train(arm: str, seed: int, dense: Path, args: argparse.Namespace) -> None:
  folder = args.workdir / f"{arm}_{seed}"
  if not folder.exists():
    source = (f"--workdir={dense}", f"--step={args.branch}", f"--out={folder}", f"--seed={seed}")
    # All held-out batches: the loss at the branch is that of an evaluation.
    _run("convert", "upcycle", *source, *ARMS[arm], "--batches=1000000")
  _run("train", f"--config={folder / 'config.py'}", f"--workdir={folder}")


def _run(*words: str) -> None:
  if status := moe_jax(list(words)):
    raise SystemExit(status)


def _results(arm: str, seeds: list[int], workdir: Path) -> dict:
  """Reads what all seeds of an arm have come to."""
  folders = [workdir / f"{arm}_{seed}" for seed in seeds]
  rows = [
    [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    for folder in folders
  ]
  config = load_experiment(folders[0])
  count = count_parameters(config.model)
  return {
    "seeds": seeds,
    "branch": [_branch(arm, workdir, seed) for seed in seeds],
    "at_capacity": [row[-1].get("eval_loss_at_capacity") for row in rows],
    "end": [each[-1]["eval_loss"] for each in rows],
    "evaluations": [
      {row["step"]: row["eval_loss"] for row in each if "eval_loss" in row} for each in rows
    ],
    "parameters": count.total,
    "active_parameters": count.active,
    "flops_per_token": training_flops_per_token(config.model, config.data.sequence_length),
  }


def _branch(arm: str, workdir: Path, seed: int) -> float:
  """Returns the loss of an arm before its first step; that of the dense run, any arm has noted."""
  source = "*" if arm == "dense" else arm
  note = json.loads(next(workdir.glob(f"{source}_{seed}/{NOTE_FILE}")).read_text())
  return note["step_0"]["loss_before" if arm == "dense" else "loss_after"]


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=Path, default=Path("runs/upcycled_quickstart"))
  parser.add_argument("--out", type=Path, default=_HERE)
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--arms", default=",".join(ARMS))
  parser.add_argument("--branch", type=int, default=1000, help="step that is upcycled")
  parser.add_argument("override", nargs="*", help="config overrides such as steps=100")
  return parser.parse_args()


if __name__ == "__main__":
  main()
