"""Times the experts of each device under Zipf loads, before and after balancing their placement.

    python -m experiments.benchmarks.placement [--skew 1.0] [--spare 8,16] [--rounds 5]

Devices wait for the slowest, so what counts is its time. The README beside this file says how to
read the table.
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.moe import Dispatch, RoutingPlan
from moe_jax.moe.experts import ExpertForm, apply_plan
from moe_jax.moe.placement_balance import Devices, imbalance
from moe_jax.moe.placement_change import better_placement


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is timed: one MoE layer's experts over emulated devices, forward and backward."""

  experts: int = 64
  devices: int = 8
  rows: int = 32768
  model_dim: int = 256
  network: FeedForwardConfig = FeedForwardConfig(512, gated=True, activation="silu")


TINY = Setting(16, 4, 512, 8, FeedForwardConfig(16))


def main(argv: list[str] | None = None) -> None:
  """Runs the benchmark: a table on stdout, raw figures in `--json`."""
  args = _parse(argv)
  setting = TINY if args.tiny else Setting()
  loads = zipf_rows(setting, args.skew)
  cases = {name: placed_rows(setting, loads, spare) for name, spare in _cases(args.spare)}
  report = measure(setting, cases, args)
  print(
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.rounds} rounds, {args.clock}"
    f" time; E {setting.experts} D {setting.model_dim} F {setting.network.hidden_dim},"
    f" {setting.rows} rows over {setting.devices} devices, Zipf({args.skew})"
  )
  print(
    f"{'':12}{'max/mean':>9}{'slowest ms':>12}{'predicted x':>13}{'measured x':>12}"
    f"{'step x':>8}{'fetched MiB':>13}"
  )
  for name, case in report.items():
    print(_row(name, case), flush=True)
  print(f"step x: predicted where experts take {args.share:.0%} of a step whose devices are even")
  if args.json:
    args.json.write_text(json.dumps(report, indent=2) + "\n")


def zipf_rows(setting: Setting, skew: float) -> np.ndarray:
  """Returns (E,) int, rows of each expert, their shares Zipf(skew) in a random order."""
  share = np.random.default_rng(0).permutation(np.arange(1, setting.experts + 1) ** -skew)
  return np.floor(setting.rows * share / share.sum()).astype(int)


def placed_rows(setting: Setting, loads: np.ndarray, spare: int | None) -> np.ndarray:
  """Returns (devices, experts of one) int, the rows that each device computes for each.

  Args:
    setting: the devices.
    loads: (E,) rows.
    spare: slots for copies; None for experts where they are.
  """
  own, devices = np.arange(setting.experts).reshape(setting.devices, -1), setting.devices
  if spare is None:
    return loads[own]
  copied = np.zeros((1, spare), np.int32)
  change = better_placement(loads[None].astype(np.float32), copied, Devices(devices))
  held = np.concatenate([own, change.copied.reshape(devices, -1)], axis=1)
  replicas = np.bincount(held.reshape(-1), minlength=setting.experts)
  return loads[change.order[0]][held] // replicas[held]


def measure(setting: Setting, cases: dict[str, np.ndarray], args) -> dict[str, dict]:
  """Returns a record a case: the load and time of the slowest device, and the gains."""
  room = max(int(rows.sum(axis=1).max()) for rows in cases.values())
  programs = [program for rows in cases.values() for program in _programs(setting, rows, room)]
  seconds = timing.time_interleaved(
    programs, [args.rounds] * len(programs), args.clock, on_round=lambda index: None
  )
  fastest = np.array([min(each) for each in seconds]).reshape(len(cases), setting.devices)
  records = {
    name: _record(setting, rows, times)
    for (name, rows), times in zip(cases.items(), fastest, strict=True)
  }
  return _with_gains(records, args.share)


def _record(setting: Setting, rows: np.ndarray, seconds: np.ndarray) -> dict:
  expert = setting.network.num_matrices * setting.model_dim * setting.network.hidden_dim
  return {
    "load": float(imbalance(rows.sum(axis=1)[None].astype(float))[0]),
    "ms": 1e3 * float(seconds.max()),
    # In bfloat16, by all devices together.
    "fetched": (rows.size - setting.experts) * expert * 2 / 2**20,
    "milliseconds": [1e3 * float(each) for each in seconds],
  }


def _with_gains(records: dict[str, dict], share: float) -> dict[str, dict]:
  """Adds how many times faster than the first each is; the step also has what is not experts."""
  first = next(iter(records.values()))

  def gains(record):
    before, after = (1 - share + share * each["load"] for each in (first, record))
    return {
      "predicted": first["load"] / record["load"],
      "measured": first["ms"] / record["ms"],
      "step": before / after,
    }

  return {name: record | gains(record) for name, record in records.items()}


def _row(name: str, case: dict) -> str:
  return (
    f"{name:12}{case['load']:9.3f}{case['ms']:12.1f}{case['predicted']:13.2f}"
    f"{case['measured']:12.2f}{case['step']:8.2f}{case['fetched']:13.1f}"
  )


def _programs(setting: Setting, rows: np.ndarray, room: int) -> list[timing.Program]:
  """Returns the experts' work, forward and backward, of each device: one program for all."""
  form = ExpertForm(setting.network, Dispatch.RAGGED)
  draw, width = np.random.default_rng(0), (setting.model_dim, setting.network.hidden_dim)
  names = ("gate", "up", "down") if setting.network.gated else ("up", "down")
  weights = {
    name: jnp.asarray(
      0.05 * draw.standard_normal((rows.shape[1], *(width[::-1] if name == "down" else width))),
      jnp.float32,
    )
    for name in names
  }
  x = jnp.asarray(draw.standard_normal((1, room, setting.model_dim)), jnp.float32)

  def loss(x, weights, plan):
    return jnp.sum(jnp.square(apply_plan(x, plan, weights, None, form)))

  plans = [device_plan(own, room) for own in rows]
  first = timing.compile_program(jax.grad(loss, argnums=(0, 1)), x, weights, plans[0])
  return [dataclasses.replace(first, args=(x, weights, plan)) for plan in plans]


def device_plan(rows: np.ndarray, room: int) -> RoutingPlan:
  """Returns the plan of a device with so many rows for each of its experts, and room for more."""
  expert, used = np.zeros((1, room), np.int32), int(rows.sum())
  expert[0, :used] = np.repeat(np.arange(len(rows)), rows)
  # As they arrive from other devices: in no order.
  np.random.default_rng(0).shuffle(expert[0, :used])
  token = jnp.arange(room, dtype=jnp.int32)[None]
  valid = token < used
  weight = valid.astype(jnp.float32)
  return RoutingPlan(
    token, jnp.asarray(expert), token, weight, valid, None, {}, {}, room, len(rows), room, 1
  )


def _cases(spares: list[int]) -> list[tuple[str, int | None]]:
  return [("as born", None), ("moved", 0), *((f"{spare} copies", spare) for spare in spares)]


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--skew", type=float, default=1.0, help="Zipf exponent (default: 1.0)")
  parser.add_argument(
    "--spare", type=timing.integers, default=[8, 16], help="slots for copies (default: 8,16)"
  )
  parser.add_argument(
    "--share", type=float, default=0.5, help="of a balanced step, the experts' (default: 0.5)"
  )
  parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
  parser.add_argument("--tiny", action="store_true", help="sizes for a test")
  parser.add_argument("--json", type=pathlib.Path, help="file for the raw figures")
  timing.add_clock(parser)
  return parser.parse_args(argv)


if __name__ == "__main__":
  main()
