"""A run that trains in a second: the quickstart's config with everything small, text included."""

import os
import runpy
from pathlib import Path

from moe_jax.training.config import ExperimentConfig, experiment_from

ROOT = Path(__file__).parents[2]

OVERRIDES = {
  "imports": ("tiny_corpus",),
  "data.corpus": "beginnings",
  "steps": 6,
  "batch_size": 4,
  "data.sequence_length": 32,
  "model.model_dim": 16,
  "model.num_heads": 2,
  "model.num_kv_heads": 1,
  "model.head_dim": 8,
  "model.mlp.hidden_dim": 32,
  "optimizer.warmup_steps": 2,
  "eval.every": 3,
  "eval.batch_size": 64,
  "checkpoint.every": 2,
  "log.every": 1,
  "sample.max_new_tokens": 8,
}
MOE_OVERRIDES = {"moe.hidden_dim": 32, "moe.num_experts": 4}


def mapping(variant: str = "moe", **overrides) -> dict:
  """Returns the quickstart's mapping with the tiny overrides and then `overrides` (dots as __)."""
  config = runpy.run_path(str(ROOT / "configs/quickstart.py"))["get_config"](variant)
  chosen = {**OVERRIDES, **(MOE_OVERRIDES if variant == "moe" else {})}
  chosen |= {name.replace("__", "."): value for name, value in overrides.items()}
  config.update_from_flattened_dict(chosen)
  return config.to_dict()


def experiment(variant: str = "moe", **overrides) -> ExperimentConfig:
  """Returns the tiny experiment."""
  return experiment_from(mapping(variant, **overrides))


def command(workdir, variant: str = "moe", **overrides) -> list[str]:
  """Returns the words of a `moe-jax train` command line for the tiny run."""
  chosen = {**OVERRIDES, **(MOE_OVERRIDES if variant == "moe" else {})}
  chosen |= {name.replace("__", "."): value for name, value in overrides.items()}
  return [
    "train",
    f"--config={ROOT / 'configs/quickstart.py'}:{variant}",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in chosen.items()),
  ]


def environment(**variables: str) -> dict[str, str]:
  """Returns the variables of a process of its own that runs `command`, and `variables`."""
  paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
  return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths} | variables


def pair_experiment(**overrides) -> ExperimentConfig:
  """Returns a tiny encoder-decoder with experts in each of its two layers."""
  attention = dict(num_heads=2, num_kv_heads=2, head_dim=8, positions="none")
  segments = (("attention:moe", 1),)
  pairs = mapping(model__segments=segments, **overrides) | {"objective": {"kind": "second_half"}}
  encoder = dict(segments=segments, attention=attention)
  pairs["model"] |= dict(encoder=encoder, cross_attention=attention)
  return experiment_from(pairs)
