"""Write run folders that look like real ones, for the report's tests."""

import json
import math
from pathlib import Path

import numpy as np

_LN2 = math.log(2)
_TOKENS = [
  "e",
  " ",
  "\n",
  "th",
  " the",
  " and",
  "ROMEO",
  ":",
  ", ",
  "ing",
  "<b>",
  "\t",
  "\x07",
  "é",
]


def write_run(
  folder: Path,
  *,
  rows: int = 200,
  log_every: int = 10,
  num_experts: int = 8,
  layers: tuple[int, ...] = (1, 3),
  seed: int = 0,
  baseline: bool = True,
) -> Path:
  """Writes a complete run folder; no `layers` makes it a dense run."""
  folder.mkdir(parents=True, exist_ok=True)
  generator = np.random.default_rng(seed)
  loads = {layer: _load_walk(generator, rows, num_experts) for layer in layers}
  lines = [_row(generator, i, rows, log_every, loads) for i in range(rows)]
  write_metrics(folder, lines)
  config = _config(rows * log_every, num_experts, layers, seed)
  if baseline:
    config["report"]["baseline"] = str(_write_baseline(folder, rows * log_every))
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "summary.json").write_text(json.dumps(_summary(generator, lines, loads)))
  return folder


def write_metrics(folder: Path, lines: list[dict]) -> None:
  """Writes metrics.jsonl from one dict for each row."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _curve(step: float) -> float:
  return 1.18 + 4.4 * math.exp(-step / 60) + 1.3 * math.exp(-step / 700)


def _row(generator, index, rows, log_every, loads) -> dict:
  step = (index + 1) * log_every
  row = {
    "step": step,
    "loss": _curve(step) + generator.normal(0, 0.06),
    "aux_loss": 0.01 * (1 + 2 * math.exp(-step / 200)) * generator.uniform(0.98, 1.02),
    "z_loss": 0.001 * (1 + math.exp(-step / 300)) * generator.uniform(0.9, 1.1),
    "grad_norm": (0.5 + 3 * math.exp(-step / 100)) * generator.lognormal(0, 0.2),
    "learning_rate": 3e-3 * min(1, step / 200) * (0.55 + 0.45 * math.cos(math.pi * index / rows)),
    "tokens_per_second": 41_000 * generator.uniform(0.93, 1.03),
    "tokens": step * 2048,
  }
  if index % 10 == 9 or index == rows - 1:
    loss = _curve(step) + 0.09 + generator.normal(0, 0.008)
    row |= {"eval_loss": loss, "eval_bits_per_byte": loss / _LN2 * 0.97}
    row |= {"eval_loss_at_capacity": loss + 0.02} if loads else {}
  for layer, walk in loads.items():
    row |= _routing_row(generator, f"moe/layer_{layer}/", walk[index])
  if loads:
    for name in ("dropped_fraction", "max_violation", "load_entropy", "dead_experts"):
      row[f"moe/{name}"] = float(np.mean([row[f"moe/layer_{layer}/{name}"] for layer in loads]))
  return row


def _routing_row(generator, prefix, load) -> dict:
  num_experts = len(load)
  entropy = -sum(share * math.log(share) for share in load if share > 0)
  return {
    f"{prefix}load": load.tolist(),
    f"{prefix}max_violation": float(load.max() * num_experts - 1),
    f"{prefix}max_violation_floor": 0.03 * math.sqrt(num_experts) * generator.uniform(0.9, 1.1),
    f"{prefix}load_entropy": entropy / math.log(num_experts) if num_experts > 1 else 1.0,
    f"{prefix}dropped_fraction": float(np.maximum(load - 1.25 / num_experts, 0).sum()),
    f"{prefix}dead_experts": int((load < 0.02 / num_experts).sum()),
    f"{prefix}router_confidence": float(0.4 + 0.3 * generator.uniform()),
  }


def _load_walk(generator, rows, num_experts) -> np.ndarray:
  """Returns (rows, E) loads that start uneven and settle, as under a balance loss."""
  start = generator.normal(0, 1.6, num_experts)
  decay = np.exp(-np.arange(rows) / (rows / 5))[:, None]
  logits = start * decay + generator.normal(0, 0.12, (rows, num_experts))
  shares = np.exp(logits)
  return shares / shares.sum(axis=1, keepdims=True)


def _config(steps, num_experts, layers, seed) -> dict:
  return {
    "seed": seed,
    "steps": steps,
    "batch_size": 16,
    "accumulation_steps": 1,
    "dtype": "bfloat16",
    "data": {"source": "tiny_shakespeare", "sequence_length": 128, "tokenizer": "bytes"},
    "model": {"width": 128, "depth": 4, "num_heads": 4, "moe_layers": list(layers)},
    "moe": {"preset": "switch", "num_experts": num_experts, "top_k": 2, "capacity_factor": 1.25},
    "optimizer": {
      "name": "adamw",
      "learning_rate": 3e-3,
      "weight_decay": 0.1,
      "betas": [0.9, 0.95],
    },
    "eval": {"every": 100, "batches": 16},
    "checkpoint": {"every": 500, "keep": 2},
    "log": {"every": 10},
    "sample": {"prompt": "ROMEO:", "temperature": 0.8},
    "report": {"baseline": ""},
  }


def _write_baseline(folder, steps) -> Path:
  path = folder / "baseline.json"
  points = [
    [step, _curve(step) + 0.19, 0.012 + 0.05 * math.exp(-step / 300)]
    for step in np.linspace(steps / 20, steps, 20).tolist()
  ]
  content = {"name": "dense, same active FLOPs", "seeds": 3, "points": points}
  path.write_text(json.dumps(content | {"note": "Same data order, width and steps."}))
  return path


def _summary(generator, lines, loads) -> dict:
  last = lines[-1]
  return {
    "parameters": {"total": 3_412_608, "active": 1_184_384, "routed_experts": 2_971_136},
    "flops_per_token": 7.21e6,
    "tokens_seen": last["tokens"],
    "eval": {
      "loss": last["eval_loss"],
      "bits_per_byte": last["eval_bits_per_byte"],
      "loss_at_capacity": last.get("eval_loss_at_capacity"),
      "dropped_fraction_at_capacity": 0.013 if loads else None,
    },
    "compressors": {"xz": 2.71, "xz_primed": 2.33},
    "sample": {
      "prompt": "ROMEO:",
      "text": "\nWhat, <script>alert('art')</script> & \"bold\"?\n\nJULIET:\nAy!\n",
      "temperature": 0.8,
    },
    "routing": [
      {"layer": layer, "experts": _experts(generator, walk[-1])} for layer, walk in loads.items()
    ],
    "wall_seconds": 247.3,
    "tokens_per_second": 40_873.0,
    "environment": {"jax": "0.10.2", "device": "cpu", "commit": "0123abc", "python": "3.11.9"},
  }


def _experts(generator, load) -> list[dict]:
  experts = []
  for share in load:
    picked = generator.choice(len(_TOKENS), 8, replace=False)
    lifts = np.sort(generator.uniform(1.1, 7.0, 8))[::-1]
    tokens = [
      {"token": _TOKENS[token], "count": int(generator.integers(12, 4000)), "lift": float(lift)}
      for token, lift in zip(picked, lifts, strict=True)
    ]
    experts.append({"share": float(share), "top_tokens": tokens})
  return experts
