"""Write each section of the report as HTML; every text from a run is escaped here."""

import json
from collections.abc import Sequence

from moe_jax.analysis import heatmap, panels
from moe_jax.analysis.loss_figure import draw_loss
from moe_jax.analysis.run_folder import Baseline, Run, baseline_path
from moe_jax.analysis.text import (
  MISSING,
  compact,
  duration,
  escape,
  finite,
  fixed,
  percent,
  visible_token,
)

_OPEN_LAYERS = 4  # heat maps beyond these start folded
_OPEN_EXPERTS = 32  # layers with more experts than this start folded


def section(identifier: str, title: str, *parts: str) -> str:
  """Wraps parts in a titled section with an anchor."""
  return f'<section id="{identifier}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def missing(what: str) -> str:
  """Says what a section lacks, in place of its content."""
  return f'<p class="missing">{escape(what)}</p>'


def caption(*sentences: str) -> str:
  """Writes the line under a figure that says what it shows."""
  return f'<p class="caption">{escape(" ".join(sentences))}</p>'


def headline(run: Run) -> str:
  """Writes the row of cards."""
  bits, loss = run.evaluated("bits_per_byte"), run.evaluated("loss")
  total, active = run.result("parameters.total"), run.result("parameters.active")
  speed = run.result("tokens_per_second")
  cards = (
    ("held-out bits per byte", fixed(bits, 3), _against_compressors(run)),
    ("held-out loss", fixed(loss, 3), _at_capacity(run)),
    ("parameters", compact(total), f"{compact(active)} active for each token"),
    ("tokens seen", compact(run.result("tokens_seen") or run.series("tokens").last), _steps(run)),
    ("tokens per second", compact(speed or run.series("tokens_per_second").last), _flops(run)),
    ("wall time", duration(run.result("wall_seconds")), _device(run)),
  )
  drawn = "".join(
    f'<div class="card"><dt>{label}</dt><dd>{escape(value)}</dd><p>{escape(note)}</p></div>'
    for label, value, note in cards
  )
  return f'<dl class="cards">{drawn}</dl>'


def verdict(run: Run) -> str:
  """Says in a sentence how the model fares against the compressors."""
  bits = run.evaluated("bits_per_byte")
  found = [
    (name, value)
    for name, key in (
      ("xz\u00a0-9", "xz"),
      ("xz\u00a0-9 primed with the training text", "xz_primed"),
    )
    if finite(value := run.result(f"compressors.{key}")) and value
  ]
  if not finite(bits) or not found:
    return ""
  clauses = [f"{_less_or_more(bits / value - 1)} than {name}" for name, value in found]
  text = f"The model codes the held-out text in {fixed(bits, 3)} bits per byte: "
  return f'<p class="verdict">{escape(text + " and ".join(clauses))}.</p>'


def loss(run: Run, baseline: Baseline | None, others: Sequence[tuple[str, Run]]) -> str:
  """Writes the loss curves and what their caption must say."""
  figure = draw_loss(run, baseline, others)
  sentences = [
    "Language-model loss without the auxiliary losses, −mean ln p(next token).",
    *figure.remarks,
  ]
  if run.layers:
    sentences.append(
      "The held-out loss lets every token reach its experts; at training capacity some are dropped."
    )
  if run.bits_per_byte_per_nat:
    factor = fixed(run.bits_per_byte_per_nat, 4)
    sentences.append(
      f"Right axis: bits per byte = nats per token × tokens / bytes / ln 2 = × {factor} "
      "on the held-out text."
    )
  if baseline is not None:
    sentences.append(_baseline_sentence(baseline))
  parts = [_legend(figure.legend), f"<figure>{figure.image}</figure>", caption(*sentences)]
  named = baseline_path(run)
  if named is not None and baseline is None:
    parts.append(missing(f"The baseline file that the config names is not there: {named.name}."))
  elif named is None:
    parts.append(missing("The config names no baseline curve (report.baseline)."))
  if not run.series("eval_loss"):
    parts.append(missing("metrics.jsonl holds no held-out loss (eval_loss)."))
  return section("loss", "Loss", *parts)


def load(run: Run) -> str:
  """Writes one heat map of expert load for each MoE layer."""
  loads = {layer: run.load(layer) for layer in run.layers}
  loads = {layer: pair for layer, pair in loads.items() if len(pair[1])}
  if not loads:
    return section("load", "Expert load", missing(_no_moe("expert load")))
  limit = heatmap.ratio_limit([shares for _, shares in loads.values()])
  figures = []
  for layer, (steps, shares) in loads.items():
    count = _experts(shares.shape[1])
    image = heatmap.heat_map(steps, shares, limit, f"Load of {count} in layer {layer} by step")
    heading = f"Layer {layer} <small>{count}, even share {percent(1 / shares.shape[1])}</small>"
    figures.append(f"<h3>{heading}</h3><figure>{image}</figure>")
  explained = caption(
    "Each row is an expert, each column a stretch of steps; colour is the expert's share of the "
    "assignments over the even share 1/E, on a log scale. Clear is even. "
    "The percentages are the shares at the last logged step."
  )
  return section("load", "Expert load", _colour_key(limit), _folded(figures), explained)


def routing(run: Run) -> str:
  """Writes the small charts of routing health."""
  drawn = panels.routing_panels(run)
  if not drawn:
    return section("balance", "Balance", missing(_no_moe("routing metrics")))
  legend = ""
  if 1 < len(run.layers) <= len(panels.LAYER_STYLES):
    styles = [(panels.layer_style(run.layers, layer), f"layer {layer}") for layer in run.layers]
    legend = _legend(styles)
  return section("balance", "Balance", legend, _panel_grid(drawn, run.last_step))


def optimisation(run: Run) -> str:
  """Writes the small charts of the optimiser."""
  drawn = panels.optimisation_panels(run)
  content = (
    _panel_grid(drawn, run.last_step)
    if drawn
    else missing("metrics.jsonl holds no auxiliary loss, gradient norm, learning rate or speed.")
  )
  return section("optimisation", "Optimisation", content)


def experts(run: Run) -> str:
  """Writes what each expert took, layer by layer."""
  layers = run.result("routing") or []
  if not layers:
    return section("experts", "What the experts took", missing(_no_moe("top tokens")))
  parts = [_layer_experts(entry) for entry in layers]
  explained = caption(
    "Share: the expert's part of all assignments on the held-out text. "
    "× lift: P(expert | token) / P(expert), how many times more often than average the token goes "
    "to this expert; 1 is no preference. ␣ is a space, \\n a line break."
  )
  return section("experts", "What the experts took", *parts, explained)


def sample(run: Run) -> str:
  """Writes the sampled text, its prompt set apart."""
  text = run.result("sample.text")
  if not text:
    return section("sample", "Sample", missing("summary.json holds no sample."))
  prompt = str(run.result("sample.prompt") or "")
  temperature = run.result("sample.temperature")
  drawn = f" at temperature {temperature:g}" if finite(temperature) else ""
  return section(
    "sample",
    "Sample",
    f'<pre class="sample"><b>{escape(prompt)}</b>{escape(text)}</pre>',
    caption(f"Bold is the prompt; the rest was drawn{drawn}, unedited."),
  )


def configuration(run: Run) -> str:
  """Writes the config and the environment, folded."""
  if run.config is None:
    return section("config", "Configuration", missing("The run folder holds no config.json."))
  flat = {key: value for key, value in run.config.items() if not isinstance(value, dict)}
  groups = {"run": flat} | {k: v for k, v in run.config.items() if isinstance(v, dict)}
  environment = run.result("environment")
  if isinstance(environment, dict):
    groups["environment"] = environment
  tables = "".join(_table(name, values) for name, values in groups.items() if values)
  folded = f'<details><summary>All settings</summary><div class="config">{tables}</div></details>'
  return section("config", "Configuration", folded)


def _less_or_more(change: float) -> str:
  if abs(change) < 0.0005:
    return "no fewer"
  return f"{percent(abs(change))} {'less' if change < 0 else 'more'}"


def _against_compressors(run: Run) -> str:
  xz, primed = run.result("compressors.xz"), run.result("compressors.xz_primed")
  return f"xz\u00a0-9 {fixed(xz, 3)} · primed {fixed(primed, 3)}"


def _at_capacity(run: Run) -> str:
  bounded = run.evaluated("loss_at_capacity")
  if not finite(bounded):
    return "nats per token"
  dropped = run.result("eval.dropped_fraction_at_capacity")
  drops = f", {percent(dropped)} dropped" if finite(dropped) else ""
  return f"nats per token · {fixed(bounded, 3)} at training capacity{drops}"


def _steps(run: Run) -> str:
  planned = run.setting("steps")
  steps = f"{run.last_step:,} steps"
  return (
    f"{steps} of {planned:,}" if isinstance(planned, int) and planned > run.last_step else steps
  )


def _flops(run: Run) -> str:
  flops = compact(run.result("flops_per_token"))
  if flops == MISSING:
    return "while training"
  return f"{flops}{'' if flops[-1].isalpha() else ' '}FLOP each to train"


def _device(run: Run) -> str:
  device = run.result("environment.device")
  return f"on {device}" if device else "device unknown"


def _experts(count: int) -> str:
  return f"{count} expert{'s' if count > 1 else ''}"


def _no_moe(what: str) -> str:
  return f"The run folder holds no {what}: the model is dense, or this was not recorded."


def _baseline_sentence(baseline: Baseline) -> str:
  seeds = f" over {baseline.seeds} seeds" if baseline.seeds else ""
  return (
    f"Dashed: {baseline.name}, held-out, mean ± one standard deviation{seeds}. {baseline.note}"
  ).strip()


def _folded(figures: Sequence[str]) -> str:
  """Joins figures, those beyond the first few folded away."""
  first, rest = figures[:_OPEN_LAYERS], figures[_OPEN_LAYERS:]
  if not rest:
    return "".join(first)
  summary = f"<summary>{len(rest)} more layers</summary>"
  return f"{''.join(first)}<details>{summary}{''.join(rest)}</details>"


def _legend(entries: Sequence[tuple[str, str]]) -> str:
  items = "".join(
    f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><path class="line {style}" d="M1 5h24"/>'
    f"</svg>{escape(label)}</li>"
    for style, label in entries
  )
  return f'<ul class="legend">{items}</ul>'


def _colour_key(limit: float) -> str:
  high = f"{limit:g}"
  return (
    f'<p class="key"><span>≤ 1/{high} of even</span><i></i><span>even</span>'
    f"<i></i><span>≥ {high} × even</span></p>"
  )


def _panel_grid(drawn: Sequence[panels.Panel], last_step: int) -> str:
  cells = "".join(
    f'<figure class="panel"><h3>{escape(panel.title)} <small>{escape(panel.last)}</small></h3>'
    f"{panels.draw_panel(panel, last_step)}"
    f"<figcaption>{escape(panel.meaning)}</figcaption></figure>"
    for panel in drawn
  )
  return f'<div class="panels">{cells}</div>'


def _layer_experts(entry: dict) -> str:
  found = entry["experts"]
  cards = "".join(_expert_card(index, expert, len(found)) for index, expert in enumerate(found))
  style = "experts" if len(found) <= 16 else "experts many"
  opened = " open" if len(found) <= _OPEN_EXPERTS else ""
  name = f"Layer {escape(entry['layer'])} <small>{_experts(len(found))}</small>"
  return f'<details{opened}><summary>{name}</summary><div class="{style}">{cards}</div></details>'


def _expert_card(index: int, expert: dict, num_experts: int) -> str:
  # The bar is full at twice the even share, so an even expert's is half full.
  width = min(100.0, 50.0 * expert["share"] * num_experts)
  rows = "".join(
    f'<li title="{escape(token["count"])} assignments">'
    f"<code>{escape(visible_token(token['token']))}</code>"
    f"<span>×{fixed(token['lift'], 1)}</span></li>"
    for token in expert["top_tokens"]
  )
  return (
    f'<div class="expert"><h4>Expert {index}<span>{percent(expert["share"])}</span></h4>'
    f'<div class="bar"><i style="width:{width:.1f}%"></i></div><ol>{rows}</ol></div>'
  )


def _table(name: str, values: dict) -> str:
  rows = "".join(
    f"<tr><th>{escape(key)}</th><td>{escape(_setting(value))}</td></tr>"
    for key, value in values.items()
  )
  return f"<table><caption>{escape(name)}</caption>{rows}</table>"


def _setting(value) -> str:
  return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
