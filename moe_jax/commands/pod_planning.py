"""The command `moe-jax plan --topology=...`: a training step on a pod, without the pod."""

import dataclasses
import json
from types import SimpleNamespace

from rich.console import Console
from rich.table import Table

from moe_jax.commands.tables import WIDTH, compact, plain_table
from moe_jax.planning.pod import pod_run
from moe_jax.planning.pod_plan import PodPlan, plan_pod
from moe_jax.planning.search import Found, search
from moe_jax.planning.topology import parse_topology
from moe_jax.training.config import experiment_from

_GIB = 2.0**30


def plan_on_pod(args: SimpleNamespace) -> None:
  """Prints what a step of a config costs on a pod, from a real compile for it."""
  topology = parse_topology(args.topology, args.slices)
  experiment = experiment_from(args.config.to_dict())
  run = pod_run(
    experiment, topology, layout=args.layout, batch_size=args.batch, dispatch=args.dispatch
  )
  plan = plan_pod(run, topology)
  if args.json:
    print(json.dumps({"config": args.config_source} | dataclasses.asdict(plan), indent=2))
    return
  console = Console(width=WIDTH, highlight=False, color_system=None)
  console.print(f"{args.config_source} on {topology.describe()}, {mesh_in_words(plan)}")
  console.print(_memory(plan))
  console.print(_collectives(plan))
  console.print(_times(plan))
  console.print("Assumed: " + "; ".join(plan.assumptions) + ".")


def mesh_in_words(plan: PodPlan) -> str:
  """Returns the layout and the sizes of its mesh, as `ep_fsdp (fsdp 8 x expert 8)`."""
  sizes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  return f"{plan.layout} ({sizes})"


def _memory(plan: PodPlan) -> Table:
  table = plain_table("a device", "GiB")
  for name in ("parameter", "optimizer", "activation", "peak", "hbm"):
    words = {
      "parameter": "parameters",
      "activation": "activations, gradients, buffers",
      "hbm": "the chip has",
    }.get(name, name)
    table.add_row(words, f"{getattr(plan, f'{name}_bytes') / _GIB:.2f}")
  rest = (plan.hbm_bytes - plan.peak_bytes) / _GIB
  table.add_row("fits, to spare" if plan.fits else "does not fit, too much", f"{abs(rest):.2f}")
  return table


def _collectives(plan: PodPlan) -> Table:
  table = plain_table("collective", "over", "in the program", "runs", "bytes", "ICI ms", "DCN ms")
  for each in plan.collectives:
    table.add_row(
      each.kind + (" (async)" if each.is_async else ""),
      " x ".join(each.axes) or "mixed groups",
      str(each.count),
      f"{each.runs:,.0f}",
      compact(each.num_bytes),
      f"{1e3 * each.ici_seconds:.2f}",
      f"{1e3 * each.dcn_seconds:.2f}",
    )
  table.columns[1].justify = "left"
  return table


def _times(plan: PodPlan) -> Table:
  table = plain_table("a step", "", "")
  rows = [
    ("FLOPs of the model", compact(plan.model_flops), "a device, causal, nothing recomputed"),
    ("FLOPs of the program", compact(plan.program_flops), "recomputation, empty slots, masked"),
    ("bytes of memory traffic", compact(plan.program_hbm_bytes), ""),
    ("products", f"{plan.compute_seconds:.3f} s", "at the chip's peak"),
    ("memory", f"{plan.memory_seconds:.3f} s", "at its bandwidth"),
    ("both, by instruction", f"{plan.instruction_seconds:.3f} s", "the slower of the two"),
    ("ICI", f"{plan.ici_seconds:.3f} s", "links of a slice"),
    ("DCN", f"{plan.dcn_seconds:.3f} s", "between slices"),
    ("step", f"{plan.step_seconds:.3f} s", f"MFU {plan.mfu:.1%} as compiled"),
    (
      "step, all overlapped",
      f"{plan.overlapped_step_seconds:.3f} s",
      f"MFU {plan.overlapped_mfu:.1%} if all communication hid behind work",
    ),
    ("compile time", f"{plan.compile_seconds:.0f} s", "on this machine"),
  ]
  for row in rows:
    table.add_row(*row)
  table.columns[2].justify = "left"
  return table


def search_on_pod(args: SimpleNamespace) -> None:
  """Prints the layouts that a search found for a config on a pod, against plain `fsdp`."""
  topology = parse_topology(args.topology, args.slices)
  run = pod_run(
    experiment_from(args.config.to_dict()), topology, batch_size=args.batch, dispatch=args.dispatch
  )
  found = search(run, topology)
  if args.json:
    print(json.dumps({"config": args.config_source} | _found_as_json(found), indent=2))
    return
  console = Console(width=WIDTH, highlight=False, color_system=None)
  console.print(f"{args.config_source} on {topology.describe()}")
  console.print(
    f"{found.tried:,} candidates by closed formulas, {found.refused:,} of them too large; compiled:"
  )
  console.print(_candidates(found))
  for candidate, reason in found.too_large:
    console.print(f"{candidate.label}: {reason}")
  for line in verdict(found):
    console.print(line)
  plan = found.compiled[0][1] if found.compiled else found.naive[1]
  console.print("Assumed: " + "; ".join(plan.assumptions) + ".")


def verdict(found: Found) -> list[str]:
  """Says by how much the best layout beats plain `fsdp`, and where the time goes."""
  if not found.compiled or found.naive is None:
    return []
  (best, plan), (_, naive) = found.compiled[0], found.naive
  gain = plan.mfu - naive.mfu
  parts = {
    "products and memory": naive.instruction_seconds - plan.instruction_seconds,
    "collectives": naive.ici_seconds + naive.dcn_seconds - plan.ici_seconds - plan.dcn_seconds,
  }
  why = ", ".join(f"{value:+.3f} s by {name}" for name, value in parts.items())
  return [
    f"{best.label}: MFU {plan.mfu:.1%}, plain fsdp {naive.mfu:.1%}: {100 * gain:+.1f} points.",
    f"A step saves {naive.step_seconds - plan.step_seconds:.3f} s: {why}.",
    "fsdp's longest collective: " + _longest(naive) + f"; the best one's: {_longest(plan)}.",
  ]


def _longest(plan: PodPlan) -> str:
  if not plan.collectives:
    return "none"
  first = plan.collectives[0]
  seconds = first.ici_seconds + first.dcn_seconds
  return f"{first.kind} over {' x '.join(first.axes) or 'mixed groups'}, {seconds:.3f} s"


def _candidates(found: Found) -> Table:
  table = plain_table(
    "layout", "remat", "micro", "group", "peak GiB", "work s", "links s", "step s", "MFU", "formula"
  )
  naive = [found.naive] if found.naive else []
  for candidate, plan in [*found.compiled, *naive]:
    config = candidate.run.experiment
    moe = config.model.moe
    table.add_row(
      candidate.label,
      plan.remat,
      str(plan.accumulation_steps),
      str(moe.routing.group_size) if moe else "",
      f"{plan.peak_bytes / _GIB:.1f}",
      f"{plan.instruction_seconds:.3f}",
      f"{plan.ici_seconds + plan.dcn_seconds:.3f}",
      f"{plan.step_seconds:.3f}",
      f"{plan.mfu:.1%}",
      f"{candidate.estimate.mfu:.1%}",
    )
  return table


def _found_as_json(found: Found) -> dict:
  def row(pair):
    candidate, plan = pair
    return dataclasses.asdict(plan) | {"estimate": dataclasses.asdict(candidate.estimate)}

  return {
    "tried": found.tried,
    "refused": found.refused,
    "compiled": [row(pair) for pair in found.compiled],
    "too_large": [{"layout": each.label, "reason": why} for each, why in found.too_large],
    "naive": row(found.naive) if found.naive else None,
    "verdict": verdict(found),
  }
