"""Assemble a run's report.html: one self-contained page, a pure function of the run's files."""

from collections.abc import Sequence
from pathlib import Path

from moe_jax.analysis import comparison, sections, time_spent
from moe_jax.analysis.page import page, write_whole
from moe_jax.analysis.run_folder import Run, baseline_path, read_baseline, read_run
from moe_jax.analysis.text import escape

REPORT_NAME = "report.html"
_SECTION_NAMES = (
  ("loss", "Loss"),
  ("load", "Expert load"),
  ("balance", "Balance"),
  ("experts", "Experts"),
  ("optimisation", "Optimisation"),
  ("sample", "Sample"),
  ("time", "Time"),
  ("config", "Configuration"),
)


def write_report(workdir: str | Path, compare: Sequence[str | Path] = ()) -> Path:
  """Writes `report.html` into a run folder, whole or not at all, and returns its path.

  Args:
    workdir: the run folder; only its metrics.jsonl must exist.
    compare: other run folders whose held-out curves are laid over.

  Raises:
    UserError: a folder is no run folder or a file in it is damaged.
  """
  run = read_run(workdir)
  others = comparison.labelled([read_run(folder) for folder in compare])
  path = run.path / REPORT_NAME
  write_whole(path, render(run, others))
  return path


def render(run: Run, others: Sequence[tuple[str, Run]] = ()) -> str:
  """Returns the page for a run; `others` are (label, run) pairs to compare with."""
  named = baseline_path(run)
  baseline = read_baseline(named) if named is not None else None
  body = [
    _header(run, compared=bool(others)),
    *_warnings(run),
    sections.headline(run),
    sections.verdict(run),
    sections.loss(run, baseline, others),
    comparison.section(run, others) if others else "",
    sections.load(run),
    sections.routing(run),
    sections.experts(run),
    sections.optimisation(run),
    sections.sample(run),
    time_spent.section(run.path),
    sections.configuration(run),
  ]
  return page(run.name, "\n".join(body))


def _header(run: Run, *, compared: bool) -> str:
  names = list(_SECTION_NAMES)
  if compared:
    names.insert(1, ("comparison", "Comparison"))
  links = "".join(f'<a href="#{identifier}">{name}</a>' for identifier, name in names)
  return (
    f'<header><p class="kicker">moe_jax run report</p><h1>{escape(run.name)}</h1>'
    f'<p class="subtitle">{escape(_subtitle(run))}</p><nav>{links}</nav></header>'
  )


def _subtitle(run: Run) -> str:
  """Names the routing, the data and the environment, as far as they are known."""
  moe, environment = (run.setting("moe") or {}), (run.result("environment") or {})
  facts = []
  if run.layers:
    experts = moe.get("num_experts")
    facts.append("mixture of experts")
    facts += [f"{experts} expert{'s' if experts != 1 else ''}"] if experts else []
    facts += [f"top-{moe['top_k']}"] if moe.get("top_k") else []
    facts.append(f"MoE in layers {', '.join(map(str, run.layers))}")
  elif run.config is not None:
    facts.append("dense model")
  facts += [f"JAX {environment['jax']}"] if environment.get("jax") else []
  facts += [f"commit {environment['commit']}"] if environment.get("commit") else []
  return " · ".join(facts)


def _warnings(run: Run) -> list[str]:
  """Writes what the reader must know before trusting the numbers."""
  texts = []
  if run.truncated:
    texts.append(
      "The last line of metrics.jsonl is incomplete, as after a killed run; "
      f"it is left out, and the report ends at step {run.last_step:,}."
    )
  if run.summary is None:
    texts.append(
      "The run folder holds no summary.json: the run did not finish, "
      "so parameters, compressors, sample and top tokens are missing."
    )
  loss = run.series("loss")
  broken = [int(s) for s, v in zip(loss.steps, loss.values, strict=True) if v != v]
  if broken:
    texts.append(
      f"The training loss is not finite in {len(broken):,} of {len(loss.steps):,} logged rows, "
      f"first at step {broken[0]:,}."
    )
  return [f'<p class="warning">{escape(text)}</p>' for text in texts]
