"""The command `moe-jax analyze`."""

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
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
  subject = _Subject.load(workdir, args.step, _named(args.domain))
  _make_folder(out)
  found = subject.results(args.batches)
  _write_tables(out, found)
  write_whole(out / PAGE, render(found))
  print(f"{found.tokens:,} tokens, {len(found.shares)} MoE layers, step {found.step}")
  print(f"tables in {out}; open {out / PAGE}")


def analyze_run(
  workdir: Path,
  *,
  step: int | None = None,
  domains: Mapping[str, str] | None = None,
  batches: int = 4,
) -> AnalysisResults:
  """Returns what `moe-jax analyze` writes, and writes nothing.

  Args:
    workdir: the run folder.
    step: of the checkpoint; None = the last one.
    domains: name and source of each held-out text; the run's own by default.
    batches: of each text.

  Raises:
    UserError: a run without a router of tokens, or a bad source.
  """
  return _Subject.load(workdir, step, domains or {}).results(batches)


@dataclasses.dataclass(frozen=True)
class _Subject:
  """A checkpoint that can be analysed, and the texts that it is to route."""

  workdir: Path
  config: ExperimentConfig
  step: int
  model: nnx.State
  texts: Mapping[str, PreparedData]

  @classmethod
  def load(cls, workdir: Path, step: int | None, domains: Mapping[str, str]) -> "_Subject":
    config, step, model = load_run(workdir, step)
    _check(workdir, config)
    return cls(workdir, config, step, model, _texts(config, domains))

  def results(self, batches: int) -> AnalysisResults:
    graph = model_graph(self.config.model.dropless())
    recorder = RoutingRecorder(graph, self.texts, self.config.batch_size, batches)
    earlier = [step for step in saved_steps(self.workdir / FOLDER) if step < self.step]
    models = [load_run(self.workdir, step)[1:] for step in earlier] + [(self.step, self.model)]
    traces = [recorder.trace(variables, at, self.workdir.name) for at, variables in models]
    found = _results(self.config, traces, recorder, self.model)
    return dataclasses.replace(found, losses=_losses(self.config, self.model))


def _check(workdir: Path, config: ExperimentConfig) -> None:
  if config.model.moe is None:
    raise UserError(f"{workdir} holds a model without experts: there is no routing to analyse")
  if config.model.encoder is not None:
    raise UserError(f"{workdir} holds an encoder-decoder; analyses are of decoders alone")
  if config.data.image is not None:
    raise UserError(f"{workdir} reads images; analyses are of text alone")


def _named(words: Sequence[str]) -> dict[str, str]:
  """Returns the sources of --domain by their names."""
  sources = {}
  for word in words:
    name, equals, source = word.partition("=")
    if not (name and equals and source):
      raise UserError(f"--domain={word} is refused: expected NAME=SOURCE, as python=python_3_11")
    sources[name] = source
  return sources


def _texts(config: ExperimentConfig, domains: Mapping[str, str]) -> dict[str, PreparedData]:
  """Returns the held-out texts by name: those asked for, or else the run's own sources."""
  own = {part.name: word for part, word in zip(config.data.parts, _words(config), strict=True)}
  alone = dataclasses.replace(config.data, corpus=DataConfig.corpus)
  return {
    name: prepare(dataclasses.replace(alone, sources=(source,)))
    for name, source in (domains or own).items()
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
