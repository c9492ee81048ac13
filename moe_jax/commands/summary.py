"""The summary of a finished run: what the report's headline shows, in summary.json."""

import json
import platform
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax.analysis.compressors import xz_bits_per_byte, xz_primed_bits_per_byte
from moe_jax.analysis.routing import ExpertTokenCounts
from moe_jax.data.builders import PreparedData
from moe_jax.data.loader import eval_batches
from moe_jax.inference.text import continue_text
from moe_jax.models import Model
from moe_jax.models.run_batch import run_batch
from moe_jax.moe.groups import to_groups
from moe_jax.planning.count import count_parameters
from moe_jax.planning.flops import training_flops_per_token
from moe_jax.provenance import source_commit
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.run_folder import METRICS_FILE
from moe_jax.training.state import Stream, model_graph, stream_key

_TOP_TOKENS = 8


def summarize(
  config: ExperimentConfig, data: PreparedData, params: nnx.State, workdir: Path
) -> dict[str, Any]:
  """Returns the summary of a run whose last row is in metrics.jsonl.

  The keys are those of the report: parameters, flops_per_token, tokens_seen, eval, compressors,
  sample, routing, tokens_per_second, environment.
  """
  rows = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
  last = rows[-1]
  count = count_parameters(config.model)
  model = nnx.merge(model_graph(config.model.dropless()), params)
  speeds = [row["tokens_per_second"] for row in rows if row["tokens_per_second"] is not None]
  return {
    "parameters": {
      "total": count.total,
      "active": count.active,
      "routed_experts": count.routed_experts,
    },
    "flops_per_token": training_flops_per_token(config.model, config.data.sequence_length),
    "tokens_seen": last["tokens"],
    "eval": {
      "loss": last["eval_loss"],
      "bits_per_byte": last["eval_bits_per_byte"],
      "loss_at_capacity": last.get("eval_loss_at_capacity"),
      "dropped_fraction_at_capacity": last.get("eval_dropped_fraction_at_capacity"),
      "accuracy": last.get("eval_accuracy"),
    },
    "compressors": {
      "xz": xz_bits_per_byte(data.heldout_text),
      "xz_primed": xz_primed_bits_per_byte(data.heldout_text, data.train_text),
    },
    "sample": sample(config, data, model),
    "routing": expert_tokens(config, data, model),
    "tokens_per_second": statistics.median(speeds) if speeds else None,
    "environment": environment(),
  }


def sample(config: ExperimentConfig, data: PreparedData, model: Model) -> dict[str, Any]:
  """Returns the prompt, its continuation and the temperature; a function of the run's seed.

  A model that reads images is shown the first that is held out.
  """
  c = config.sample
  key = stream_key(config.seed, Stream.SAMPLE)
  image, shown = None, c.prompt
  if config.data.image is not None:
    record = data.heldout[0]
    image, text = record["pixel_values"], record["targets"][record["loss_mask"] > 0]
    shown = f"[held-out image of {data.tokenizer.decode(text)}] {c.prompt}"
  text = continue_text(
    model,
    data.tokenizer,
    c.prompt,
    c.max_new_tokens,
    temperature=c.temperature,
    key=key,
    question=config.question,
    image=image,
  )
  return {"prompt": shown, "text": text, "temperature": c.temperature}


def expert_tokens(
  config: ExperimentConfig, data: PreparedData, model: Model
) -> list[dict[str, Any]]:
  """Returns, for each MoE layer, the share of held-out tokens and the top tokens of each expert."""
  layers = config.model.moe_layers()
  if not layers:
    return []
  graph, params = nnx.split(model)

  @jax.jit
  def experts_of(params, batch):
    _, aux = run_batch(nnx.merge(graph, params), batch)
    return [(plan.expert, plan.valid, plan.token) for plan in aux.plans]

  routing = config.model.moe.routing
  encoder = config.model.encoder_stack()
  first_decoder_layer = 0 if encoder is None else len(encoder.layers())
  counts = [ExpertTokenCounts(routing.num_experts, config.model.vocab_size) for _ in layers]
  for batch in eval_batches(data.heldout, config.batch_size, transform=config.pair_maker):
    found = jax.device_get(experts_of(params, batch))
    for layer, count, (expert, valid, token) in zip(layers, counts, found, strict=True):
      read = batch["source_tokens" if layer < first_decoder_layer else "tokens"]
      ids = np.take_along_axis(np.asarray(to_groups(read, routing)), token, axis=1)
      count.add(ids, expert[..., None], valid)

  def decode(token):
    return data.tokenizer.decode([token])

  return [
    {"layer": layer, "experts": count.top_tokens(decode, _TOP_TOKENS)}
    for layer, count in zip(layers, counts, strict=True)
  ]


def environment() -> dict[str, Any]:
  """Returns versions, the device, and the commit of this code."""
  return {
    "jax": jax.__version__,
    "flax": metadata.version("flax"),
    "python": platform.python_version(),
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "commit": source_commit(),
  }
