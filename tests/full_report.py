"""Writes what the tests marked `full` found, after each of them: such a run may be cut.

A test says what it covered by `record_property` of "configs" and "inputs". Results of several runs
are merged by the tests' names, each with the commit and the versions that it ran on.
"""

import collections
import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from moe_jax.provenance import source_commit

HEADER = """# The exhaustive tests

Written by `make test-full` (`tests/full_report.py`) from [full_results.json](full_results.json).

- `test_routing_product`: `route` against the NumPy float64 loops of `tests/oracles`, on CPU. A
  config is one combination of E and K, limits, weighting, drop order, priority and overflow with
  the selection; every allowed one is run, the other options drawn. An input is a kind of logits
  (plain, tied experts, tied tokens, all equal, experts that nobody wants) with a kind of padding.
  Experts, slots and drops must be the same, weights, losses and metrics within 1e-5.
- `test_layer_product`: output and all gradients of the layer against the same loops, within 1e-5 of
  each tensor's largest entry, for one of two random cotangents. A config is a kind of plan in one
  form of dispatch.
- `test_layer_on_a_mesh`: the layer on eight devices against the same layer on one, output, losses,
  metrics and all gradients within 1e-5, drops the same. A config is a router preset with a path of
  dispatch and exchange on a mesh, those of `make test` left out.
- `test_damaged_checkpoints`: a saved step of which one byte is changed, half of them drawn by byte
  and half by file. An input is such a byte: the step must be refused by the name of the file, and
  the step before it restored bit for bit.
- `test_other_host_counts`: a run of eight devices on four hosts, told to end, goes on with two
  hosts of one device each and with one alone: rows and parameters as of an undisturbed run of one
  device, within 1e-4 (another order of sums in float32, through 24 steps of Adam).
- `test_fuzz_configs`, `test_fuzz_hub_folders`, `test_fuzz_data_folders`, `test_fuzz_runs`: damage
  drawn by hypothesis to command lines and configs, checkpoints of the hub, folders of text, and run
  folders with their checkpoints. A config is a config file, a family of models, a file format or a
  command; an input is one that no input before it equals. It must be taken, or refused in one
  sentence, within a minute; then nothing is written, and what is restored is what was saved.

A part is complete with six tests of `test_routing_product` (one a weighting; nine parts), four of
`test_layer_product` (one a selection; three parts), ten of `test_layer_on_a_mesh` (one a mesh;
eight parts) or one of the others (`test_damaged_checkpoints` five parts, `test_other_host_counts`
two, `test_fuzz_*` nine). Parts that are not listed have not been run.
"""
COLUMNS = ("test", "part", "configs", "inputs", "passed", "failed", "CPU seconds", "commit")


class FullReport:
  """A pytest plugin that keeps a folder's `full_results.json` and `FULL.md`."""

  def __init__(self, folder: Path):
    self.results, self.summary = folder / "full_results.json", folder / "FULL.md"
    folder.mkdir(parents=True, exist_ok=True)
    self.commit = source_commit()
    self.versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    self.versions["python"] = platform.python_version()

  def pytest_runtest_logreport(self, report):
    """Enters one finished test."""
    if report.when != "call" or "full" not in report.keywords or report.skipped:
      return
    results = json.loads(self.results.read_text()) if self.results.exists() else {}
    results[report.nodeid] = {
      "outcome": report.outcome,
      **dict(report.user_properties),
      "commit": self.commit,
      "versions": self.versions,
    }
    if report.failed:
      message = getattr(report.longrepr, "reprcrash", report.longrepr)
      # Paths of one machine tell no reader anything.
      text = str(message).replace(f"{Path.cwd()}{os.sep}", "")
      results[report.nodeid]["failure"] = text[:4000]
    results = dict(sorted(results.items()))
    self.results.write_text(json.dumps(results, indent=1) + "\n")
    self.summary.write_text(rendered(results))


def rendered(results: dict) -> str:
  """Returns the summary in Markdown: one row for each part of each test."""
  parts = collections.defaultdict(list)
  for name, result in results.items():
    module, part = re.search(r"(\w+)\.py::\w+\[(\w+)", name).groups()
    parts[module, part, result["commit"]].append(result)
  rows = [(" | ".join(COLUMNS)), " | ".join("---" for _ in COLUMNS)]
  rows += [" | ".join(map(str, row_of(*key, found))) for key, found in sorted(parts.items())]
  versions = sorted({json.dumps(result["versions"]) for result in results.values()})
  lines = [HEADER, *(f"| {row} |" for row in rows), "", *(f"Versions: {v}" for v in versions)]
  return "\n".join(lines) + "\n"


def row_of(module, part, commit, found):
  """Returns the values of COLUMNS for some results."""
  configs, inputs = (sum(result.get(name, 0) for result in found) for name in ("configs", "inputs"))
  failed = sum(result["outcome"] != "passed" for result in found)
  seconds = round(sum(result.get("cpu_seconds", 0) for result in found))
  return module, part, configs, inputs, len(found) - failed, failed, seconds, commit
