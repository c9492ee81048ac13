"""Times the MoE layer in every dispatch form against the dense products of the same FLOPs.

    python -m experiments.benchmarks.moe_layer [--shapes mixtral] [--forms gather,ragged]

What is timed is `MoELayer` itself: router, plan, losses, metrics, dispatch, experts and combine.
The README beside this file says how to read the table.
"""

import argparse
import datetime
import json
import pathlib
import sys

import jax
import jax.numpy as jnp

from experiments.benchmarks import hugging_face, timing
from experiments.benchmarks.cases import (
  ACCELERATOR_SHAPES,
  CPU_SHAPES,
  LIMIT_BATCHED,
  LIMIT_DENSE,
  NO_EXPERTS,
  SHAPES,
  TINY,
  Case,
  Shape,
  make_cases,
)
from moe_jax.moe import Dispatch
from moe_jax.provenance import source_commit

# Groups this large make the einsum many times slower than all else: a few rounds tell enough.
_SLOW_GROUP, _SLOW_ROUNDS = 2048, 3
_HEADER = (
  f"{'':24}{'forward x':^15}{'fwd+bwd x':^15}{'fwd+bwd x batched':^19}"
  f"{'temp MiB':^15}{'dropped':>8}\n"
  f"{'':24}{'min':>7}{'median':>8}{'min':>7}{'median':>8}{'min':>9}{'median':>10}"
  f"{'fwd':>7}{'f+b':>8}{'%':>8}"
)


def main(argv: list[str] | None = None) -> None:
  """Runs the benchmark: a table on stdout, progress on stderr, raw figures in `--json`."""
  args = _parse(argv)
  shapes = {"tiny": TINY} if args.tiny else {name: SHAPES[name] for name in args.shapes}
  report = _environment() | {"clock": args.clock, "dtype": args.dtype, "shapes": {}}
  print("{device}, jax {jax}, commit {commit}, {date}".format(**report))
  print(f"{args.dtype}, {args.clock} time, ratios to {LIMIT_DENSE} unless said otherwise")
  for name, shape in shapes.items():
    rows = measure(name, shape, args)
    report["shapes"][name] = rows
    print(f"\n{_title(name, shape, rows)}\n{_HEADER}")
    print("\n".join(_row(row) for row in rows))
    print("\n".join(_notes(shape, rows)), flush=True)
  if args.json:
    args.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(name: str, shape: Shape, args: argparse.Namespace) -> list[dict]:
  """Returns one record a case: what it is, its seconds a round, temporary bytes and ratios."""
  dtype = jnp.dtype(args.dtype)
  cases = make_cases(shape, args.forms, dtype)
  programs, records = [], []
  for index, case in enumerate(cases):
    _progress(f"{name}: compiling {index + 1}/{len(cases)}, {case.label}")
    programs += [
      timing.compile_program(fn, case.weights, case.x) for fn in (case.forward, case.backward)
    ]
    records.append(_describe(case, *programs[-2:]))
  if hugging_face.why_not(shape) is None:
    programs += hugging_face.make_programs(shape, dtype)
    records.append(_blank(hugging_face.LABEL, *programs[-2:]))
  seconds = timing.time_interleaved(
    programs,
    [rounds for record in records for rounds in [_rounds(record, args.rounds)] * 2],
    args.clock,
    on_round=lambda index: _progress(f"{name}: round {index + 1}/{args.rounds}"),
  )
  for record, forward, backward in zip(records, seconds[::2], seconds[1::2], strict=True):
    record |= {"forward_seconds": forward, "backward_seconds": backward}
  for record in records:
    record["ratios"] = _ratios(record, records)
  return records


def _blank(label: str, forward: timing.Program, backward: timing.Program) -> dict:
  """Returns the record of something that has no form, groups or capacity of ours."""
  return {
    "label": label,
    "form": label,
    "group_size": None,
    "capacity_factor": None,
    "dropped_fraction": 0.0,
    "forward_temp_bytes": forward.temp_bytes,
    "backward_temp_bytes": backward.temp_bytes,
  }


def _describe(case: Case, forward: timing.Program, backward: timing.Program) -> dict:
  _, scalars = forward.run(*forward.args)
  return _blank(case.label, forward, backward) | {
    "form": case.form,
    "group_size": case.group_size,
    "capacity_factor": case.capacity_factor,
    "dropped_fraction": float(scalars.get("dropped_fraction", 0.0)),
  }


def _ratios(record: dict, records: list[dict]) -> dict[str, tuple[float, float]]:
  """Returns (of the fastest rounds, median within rounds) for each pass and limit."""
  limits = {limit["form"]: limit for limit in records[:2]}
  pairs = [("forward", LIMIT_DENSE), ("backward", LIMIT_DENSE), ("backward", LIMIT_BATCHED)]
  return {
    f"{direction}_to_{limit}": timing.ratio(
      record[f"{direction}_seconds"], limits[limit][f"{direction}_seconds"]
    )
    for direction, limit in pairs
  }


def _rounds(record: dict, rounds: int) -> int:
  slow = record["form"] == Dispatch.EINSUM and record["group_size"] >= _SLOW_GROUP
  return min(rounds, _SLOW_ROUNDS) if slow else rounds


def _title(name: str, shape: Shape, rows: list[dict]) -> str:
  gate = "gated " if shape.network.gated else ""
  forward, backward = (1e3 * min(rows[0][f"{pass_}_seconds"]) for pass_ in ("forward", "backward"))
  return (
    f"{name}: T{shape.tokens} D{shape.model_dim} F{shape.network.hidden_dim} {gate}"
    f"{shape.network.activation} E{shape.num_experts} K{shape.top_k};"
    f" {LIMIT_DENSE} {forward:.1f} ms forward, {backward:.1f} ms fwd+bwd"
  )


def _row(row: dict) -> str:
  forward, backward, batched = row["ratios"].values()
  return (
    f"{row['label']:24}{forward[0]:7.2f}{forward[1]:8.2f}{backward[0]:7.2f}{backward[1]:8.2f}"
    f"{batched[0]:9.2f}{batched[1]:10.2f}{_mib(row['forward_temp_bytes']):>7}"
    f"{_mib(row['backward_temp_bytes']):>8}{100 * row['dropped_fraction']:8.1f}"
  )


def _mib(num_bytes: int | None) -> str:
  return "-" if num_bytes is None else f"{num_bytes / 2**20:.0f}"


def _notes(shape: Shape, rows: list[dict]) -> list[str]:
  """Returns what stands below a table: the share of all but the experts, and what is missing."""
  by_form = {row["form"]: row for row in rows}
  notes = []
  if NO_EXPERTS in by_form:
    shares = [
      100 * timing.ratio(*(by_form[form][f"{pass_}_seconds"] for form in (NO_EXPERTS, "ragged")))[0]
      for pass_ in ("forward", "backward")
    ]
    notes.append(
      "router, dispatch and combine in ragged: {:.0f} % of forward, {:.0f} % of fwd+bwd".format(
        *shares
      )
    )
  missing = hugging_face.why_not(shape)
  if missing is None:
    return notes + [f"{hugging_face.LABEL}: {hugging_face.versions()}"]
  return notes + [f"no row for {hugging_face.LABEL}: {missing}"]


def _environment() -> dict[str, str]:
  return {
    "device": f"{jax.devices()[0].platform} ({jax.devices()[0].device_kind})",
    "jax": jax.__version__,
    "commit": source_commit() or "unknown",
    "date": datetime.date.today().isoformat(),
  }


def _progress(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
  on_cpu = jax.default_backend() == "cpu"
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--shapes",
    type=_names(tuple(SHAPES)),
    default=list(CPU_SHAPES if on_cpu else ACCELERATOR_SHAPES),
    metavar="A,B",
    help=f"which of {', '.join(SHAPES)} (default: those for this platform)",
  )
  parser.add_argument(
    "--forms",
    type=_names(tuple(Dispatch)),
    default=list(Dispatch),
    metavar="A,B",
    help=f"which of {', '.join(Dispatch)} (default: all)",
  )
  parser.add_argument(
    "--rounds", type=_positive, default=20, help="interleaved rounds (default: 20)"
  )
  timing.add_clock(parser)
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32" if on_cpu else "bfloat16",
    help="of activations (default: float32 on a CPU, bfloat16 elsewhere)",
  )
  parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the raw figures")
  parser.add_argument(
    "--tiny",
    action="store_true",
    help="one shape too small to mean anything: does everything still run?",
  )
  return parser.parse_args(argv)


def _names(known: tuple[str, ...]):
  """Returns a parser of comma-separated names, in the order given."""

  def parse(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
      if name not in known:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
    return names

  return parse


def _positive(text: str) -> int:
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
  return int(text)


if __name__ == "__main__":
  main()
