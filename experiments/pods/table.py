"""Writes this folder's README, and a table of the project's, from `compile_all` and `calibrate`.

Run from the repository's root, in a second: python -m experiments.pods.table
"""

import json
from pathlib import Path

from experiments.pods.calibrate import RESULT
from experiments.pods.cases import CASES, SEARCH, Case
from experiments.pods.compile_all import result_file

README = Path(__file__).parent / "README.md"
PROJECT_README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- begin: experiments.pods.table -->\n", "<!-- end: experiments.pods.table -->\n"
_GIB = 2.0**30

_INTRO = """# Full-size models on real pods

**Question.** Does a training step of the published models, all layers, AdamW, bfloat16 activations
with float32 weights, fit on a pod, and what would it spend its time on?

**Method.** `moe-jax plan` compiles the step for the TPU topology with the compiler of the extra
`tpu`, no TPU attached, and reads the compiled program: memory from the compiler's assignment of
buffers; FLOPs, memory traffic and collectives from its instructions, loops counted as often as they
run. Times are bounds of a roofline whose assumptions every plan prints: published peaks, no
latency, synchronous collectives that hide behind nothing. No step here has run on a TPU.

`python -m experiments.pods.compile_all` compiles all cases (minutes each on two cores),
`python -m experiments.pods.calibrate` measures the roofline on this CPU, and
`python -m experiments.pods.table` writes this page.
"""

_NOTES = """A chip of a slice is counted once: v5p:4x4x4 has 64 chips and is sold as v5p-128.
MFU counts what the model's mathematics ask for, causal attention, nothing recomputed; *compiled*
waits for every collective, *overlapped* for none. Dropless models are planned with a capacity of
1.25, which every plan says. *busy* is the longer of products and memory, instruction by
instruction.
"""


def load(case: Case) -> dict | None:
  """Returns the result of a case, None where it has not run."""
  path = result_file(case)
  return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
  """Writes the page, and the table."""
  README.write_text(page())
  PROJECT_README.write_text(with_table(PROJECT_README.read_text()))


def page() -> str:
  """Returns the README of this folder."""
  parts = [_INTRO, "## Plans\n", _plans(), _NOTES, _search(), _published(), _calibration()]
  return "\n".join(part for part in parts if part)


def with_table(readme: str) -> str:
  """Returns the project's README with the plans and the search between its two marks."""
  before, rest = readme.split(BEGIN)
  _, after = rest.split(END)
  verdict = " ".join(load(SEARCH)["printed"]["verdict"])
  words = f"\n`moe-jax {' '.join(SEARCH.command)}` ends with: {verdict}\n"
  return before + BEGIN + _short_plans() + words + END + after


def _short_plans() -> str:
  head = ["model", "slice (chips)", "batch x length", "layout", "peak of HBM, GiB", "step, s"]
  head += ["MFU, nothing hidden / all exchange hidden", "compiled in, s"]
  rows = []
  for case in CASES:
    result = load(case)
    if result is None:
      continue
    plan = result["printed"]
    rows.append(
      [
        case.name,
        f"{plan['topology']} ({plan['num_chips']:,})",
        f"{plan['batch_size']:,} x {plan['sequence_length']:,}",
        _layout(plan),
        f"{plan['peak_bytes'] / _GIB:.1f} of {plan['hbm_bytes'] / _GIB:.0f}",
        f"{plan['step_seconds']:.2f}",
        f"{plan['mfu']:.1%} / {plan['overlapped_mfu']:.1%}",
        f"{plan['compile_seconds']:.0f}",
      ]
    )
  return _table(head, rows)


def _layout(plan: dict) -> str:
  mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
  return f"{plan['layout']} ({mesh})"


def _table(head: list[str], rows: list[list[str]]) -> str:
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _plans() -> str:
  head = [
    "model",
    "topology (chips)",
    "layout",
    "batch x length",
    "weights + moments GiB",
    "peak GiB",
  ]
  head += ["of GiB", "busy s", "ICI s", "step s", "MFU compiled / overlapped"]
  head += ["compile s wall / CPU", "resident GiB"]
  rows = []
  for case in CASES:
    result = load(case)
    if result is None:
      continue
    plan = result["printed"]
    state = (plan["parameter_bytes"] + plan["optimizer_bytes"]) / _GIB
    rows.append(
      [
        case.name,
        f"{plan['topology']} ({plan['num_chips']:,})",
        _layout(plan),
        f"{plan['batch_size']:,} x {plan['sequence_length']:,}",
        f"{state:.1f}",
        f"{plan['peak_bytes'] / _GIB:.1f}",
        f"{plan['hbm_bytes'] / _GIB:.0f}",
        f"{plan['instruction_seconds']:.2f}",
        f"{plan['ici_seconds']:.2f}",
        f"{plan['step_seconds']:.2f}",
        f"{plan['mfu']:.1%} / {plan['overlapped_mfu']:.1%}",
        f"{plan['compile_seconds']:.0f} / {_seconds(result.get('cpu_seconds'))}",
        f"{result['resident_gib']:.1f}",
      ]
    )
  return _table(head, rows)


def _seconds(value: float | None) -> str:
  return "-" if value is None else f"{value:.0f}"


def _search() -> str:
  result = load(SEARCH)
  if result is None:
    return ""
  found = result["printed"]
  head = ["layout", "remat", "microbatches", "peak GiB", "busy s", "ICI s", "step s", "MFU"]
  rows = []
  for plan in [*found["compiled"], *([found["naive"]] if found["naive"] else [])]:
    rows.append(
      [
        _layout(plan),
        plan["remat"],
        str(plan["accumulation_steps"]),
        f"{plan['peak_bytes'] / _GIB:.1f}",
        f"{plan['instruction_seconds']:.3f}",
        f"{plan['ici_seconds']:.3f}",
        f"{plan['step_seconds']:.3f}",
        f"{plan['mfu']:.1%}",
      ]
    )
  too_large = [f"* {each['layout']}: {each['reason']}" for each in found["too_large"]]
  return "\n".join(
    [
      f"## Search: `moe-jax {' '.join(SEARCH.command)}`\n",
      f"{found['tried']:,} candidates by closed formulas, {found['refused']:,} too large.\n",
      _table(head, rows),
      *too_large,
      " ".join(found["verdict"]),
      "",
    ]
  )


def _published() -> str:
  head = ["model", "topology", "planned MFU compiled / overlapped", "published MFU", "error"]
  head += ["published in"]
  rows = []
  for case in CASES:
    result = load(case)
    if result is None or case.published_mfu is None:
      continue
    plan, measured = result["printed"], case.published_mfu
    rows.append(
      [
        case.name,
        plan["topology"],
        f"{plan['mfu']:.1%} / {plan['overlapped_mfu']:.1%}",
        f"{measured:.1%}",
        f"{plan['mfu'] / measured - 1:+.0%} / {plan['overlapped_mfu'] / measured - 1:+.0%}",
        case.source,
      ]
    )
  if not rows:
    return ""
  return "\n".join(
    [
      "## Against published measurements\n",
      "Another program on the same chips: MaxText's steps are dropless with kernels for attention",
      "that keep the products of queries and keys on the chip. Ours has a capacity of 1.25 and",
      "writes them to memory, which the plan counts, so an MFU below the published one is no",
      "contradiction; their batch is not printed with the figure.\n",
      _table(head, rows),
    ]
  )


def _calibration() -> str:
  if not RESULT.exists():
    return ""
  result = json.loads(RESULT.read_text())
  head = ["model", "predicted work", "predicted exchange", "predicted", "measured", "error"]
  rows = [
    [
      each["model"],
      f"{each['predicted_work']:.3f}",
      f"{each['predicted_links']:.3f}",
      f"{each['predicted']:.3f}",
      f"{each['measured']:.3f}",
      f"{each['error']:+.0%}",
    ]
    for each in result["steps"]
  ]
  rates = (
    f"Measured here: {result['flops_per_cpu_second'] / 1e9:.0f} GFLOP and"
    f" {result['bytes_per_cpu_second'] / 1e9:.1f} GB a CPU second."
  )
  return "\n".join(
    [
      "## The roofline on a machine at hand\n",
      "The same reader of programs and the same model of time, with this CPU's rates for a TPU's:",
      "steps on eight emulated devices, CPU seconds of all threads, median of five.",
      rates,
      "Memory has the rate of arrays of 4 MB. It was measured on arrays of 64 MB first, beside",
      "which the predictions were 30 to 80 % too long: the size was chosen after seeing them.",
      "A roofline knows no sort, scatter, element-wise work that memory does not bound, or cache,",
      "and XLA's CPU backend does small products below the rate of large ones; the error is what",
      "it is.\n",
      _table(head, rows),
    ]
  )


if __name__ == "__main__":
  main()
