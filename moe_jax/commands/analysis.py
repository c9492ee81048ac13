"""The command `moe-jax analyze`."""

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flax import nnx

from moe_jax.analysis.analysis_page import AnalysisResults, render
from moe_jax.analysis.interventions import interventions
from moe_jax.analysis.page import write_whole
from moe_jax.analysis.routing import ExpertTokenCounts
from moe_jax.analysis.routing_measures import Measure, coactivation_table, domain_shares
from moe_jax.analysis.routing_recorder import RoutingRecorder, measure_checkpoints
from moe_jax.analysis.routing_trace import RoutingTrace
from moe_jax.analysis.text import visible_token
from moe_jax.data.builders import PreparedData, prepare
from moe_jax.data.config import DataConfig
from moe_jax.errors import UserError
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.evaluate import Evaluator
from moe_jax.training.saved_run import load_run
from moe_jax.training.state import model_graph
from moe_jax.training.step_folders import FOLDER, saved_steps

PAGE, MEASURES, LOSSES = "analysis.html", "measures.csv", "interventions.csv"
_TOP_TOKENS = 6


def analyze(args: SimpleNamespace) -> None:
  """Writes the page and the tables of how a run routes its held-out text.

  Raises:
    UserError: a run without a router of tokens, a bad domain, or a folder that cannot be written.
  """
  if args.batches < 1:
    raise UserError(f"--batches={args.batches} is refused: it must be at least 1")
  workdir = Path(args.workdir)
  out = workdir / "analysis" if args.out is None else Path(args.out)
  config, step, model = load_run(workdir, args.step)
  _check(workdir, config)
  texts = _texts(config, args.domain)
  _make_folder(out)
  earlier = [other for other in saved_steps(workdir / FOLDER) if other < step]
  models = [load_run(workdir, other)[1:] for other in earlier] + [(step, model)]
  graph = model_graph(config.model.dropless())
  recorder = RoutingRecorder(graph, texts, config.batch_size, args.batches)
  traces = [recorder.trace(variables, at, workdir.name) for at, variables in models]
  found = _results(config, traces, recorder, model)
  found = dataclasses.replace(found, losses=_losses(config, model))
  _write_tables(out, found)
  write_whole(out / PAGE, render(found))
  print(f"{found.tokens:,} tokens, {len(found.shares)} MoE layers, step {step}")
  print(f"tables in {out}; open {out / PAGE}")


def _check(workdir: Path, config: ExperimentConfig) -> None:
  if config.model.moe is None:
    raise UserError(f"{workdir} holds a model without experts: there is no routing to analyse")
  if config.model.encoder is not None:
    raise UserError(f"{workdir} holds an encoder-decoder; analyses are of decoders alone")
  if config.data.image is not None:
    raise UserError(f"{workdir} reads images; analyses are of text alone")


def _texts(config: ExperimentConfig, domains: Sequence[str]) -> dict[str, PreparedData]:
  """Returns the held-out texts by name: those of --domain, or else the run's own sources."""
  sources = {}
  for word in domains:
    name, equals, source = word.partition("=")
    if not (name and equals and source):
      raise UserError(f"--domain={word} is refused: expected NAME=SOURCE, as python=python_3_11")
    sources[name] = source
  if not sources:
    sources = {
      part.name: word for part, word in zip(config.data.parts, _words(config), strict=True)
    }
  alone = dataclasses.replace(config.data, corpus=DataConfig.corpus)
  return {
    name: prepare(dataclasses.replace(alone, sources=(source,))) for name, source in sources.items()
  }


def _words(config: ExperimentConfig) -> tuple[str, ...]:
  return config.data.sources or (config.data.corpus,)


def _make_folder(out: Path) -> None:
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{out} cannot be made ({error.strerror}); give another --out") from error


def _results(
  config: ExperimentConfig,
  traces: Sequence[RoutingTrace],
  recorder: RoutingRecorder,
  model: nnx.State,
) -> AnalysisResults:
  last, vocab_size = traces[-1], config.model.vocab_size
  several = last.layers[0].expert.shape[-1] > 1
  return AnalysisResults(
    run=last.run,
    step=last.step,
    tokens=int(last.token_mask.sum()),
    domains=recorder.domains.names,
    measures=measure_checkpoints(config.model, recorder, traces, model),
    shares=[domain_shares(last, layer, recorder.domains) for layer in last.layers],
    pairs=[coactivation_table(layer) for layer in last.layers] if several else [],
    losses={},
    tops=_tops(last, vocab_size, recorder.tokenizer),
  )


def _tops(trace: RoutingTrace, vocab_size: int, tokenizer: Any) -> list[list[list[str]]]:
  found = []
  for layer in trace.layers:
    counts = ExpertTokenCounts(layer.num_experts, vocab_size)
    counts.add(trace.tokens, layer.expert, layer.kept)
    tops = counts.top_tokens(lambda token: visible_token(tokenizer.decode([token])), _TOP_TOKENS)
    found.append([[top["token"] for top in expert["top_tokens"]] for expert in tops])
  return found


def _losses(config: ExperimentConfig, model: nnx.State) -> dict[str, float]:
  evaluator = Evaluator(config, prepare(config.data))
  losses = {"the model as it is": evaluator.dropless(model).loss}
  with interventions(config.model, model) as changes:
    for change in changes:
      losses[change.name] = evaluator.under(change.config, change.model).loss
  return losses


def _write_tables(out: Path, found: AnalysisResults) -> None:
  names = [field.name for field in dataclasses.fields(Measure)]
  rows = [[getattr(measure, name) for name in names] for measure in found.measures]
  _write_csv(out / MEASURES, names, rows)
  _write_csv(out / LOSSES, ["change", "loss"], found.losses.items())


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(head)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
