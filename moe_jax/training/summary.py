"""The summary of a finished run: what the report's headline shows, in summary.json."""

import json
import platform
import statistics
import subprocess
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
from moe_jax.inference import generate
from moe_jax.models import Decoder
from moe_jax.planning.count import count_parameters, training_flops_per_token
from moe_jax.training.config import ExperimentConfig
from moe_jax.training.run_folder import METRICS_FILE
from moe_jax.training.state import model_graph

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


def sample(config: ExperimentConfig, data: PreparedData, model: Decoder) -> dict[str, Any]:
  """Returns the prompt, its continuation and the temperature; a function of the run's seed."""
  c, tokenizer = config.sample, data.tokenizer
  prompt = np.concatenate([[tokenizer.bos_id], tokenizer.encode(c.prompt)])[None]
  tokens = generate(
    model, prompt, c.max_new_tokens, temperature=c.temperature, key=jax.random.key(config.seed)
  )
  text = tokenizer.decode(np.asarray(tokens)[0, prompt.shape[1] :])
  return {"prompt": c.prompt, "text": text, "temperature": c.temperature}


def expert_tokens(
  config: ExperimentConfig, data: PreparedData, model: Decoder
) -> list[dict[str, Any]]:
  """Returns, for each MoE layer, the share of held-out tokens and the top tokens of each expert."""
  layers = config.model.moe_layers()
  if not layers:
    return []
  graph, params = nnx.split(model)

  @jax.jit
  def experts_of(params, batch):
    _, aux = nnx.merge(graph, params)(
      batch["tokens"],
      token_mask=batch["segment_ids"] > 0,
      segment_ids=batch["segment_ids"],
      positions=batch["positions"],
      return_aux=True,
    )
    return [(plan.expert, plan.valid, plan.token) for plan in aux.plans]

  routing = config.model.moe.routing
  counts = [ExpertTokenCounts(routing.num_experts, data.vocab_size) for _ in layers]
  for batch in eval_batches(data.heldout, config.batch_size):
    for count, (expert, valid, token) in zip(
      counts, jax.device_get(experts_of(params, batch)), strict=True
    ):
      ids = np.take_along_axis(_grouped(batch["tokens"], expert.shape[0]), token, axis=1)
      count.add(ids, expert[..., None], valid)

  def decode(token):
    return data.tokenizer.decode([token])

  return [
    {"layer": layer, "experts": count.top_tokens(decode, _TOP_TOKENS)}
    for layer, count in zip(layers, counts, strict=True)
  ]


def environment() -> dict[str, str | None]:
  """Returns versions, device kind and the git commit of the working directory, if any."""
  git = subprocess.run(
    ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
  )
  device = jax.devices()[0]
  return {
    "jax": jax.__version__,
    "flax": metadata.version("flax"),
    "python": platform.python_version(),
    "device": device.device_kind,
    "devices": jax.device_count(),
    "commit": git.stdout.strip() or None,
  }


def _grouped(tokens_BL: np.ndarray, groups: int) -> np.ndarray:
  """Returns the token ids (G, S) in the router's groups, the last one filled with zeros."""
  flat = tokens_BL.reshape(-1)
  per_group = -(-flat.size // groups)
  return np.pad(flat, (0, groups * per_group - flat.size)).reshape(groups, per_group)
