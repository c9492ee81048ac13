"""The models that recipes train: a mixture of three texts, and sizes that CPUs can afford."""

import dataclasses
from typing import Any

from moe_jax.config import to_mapping
from moe_jax.moe import Overflow, RoutingConfig
from moe_jax.moe.registry import Chooser
from moe_jax.sharding.config import ShardingConfig
from moe_jax.sweep.recipe import Scale
from moe_jax.training.faults_config import FaultsConfig

DOMAINS = {"addresses": "sotu_1790_1870", "python": "python_3_11", "bible": "king_james"}
SEQUENCE_LENGTH = 128
BATCH_SIZE = 16
TOKENS_PER_STEP = SEQUENCE_LENGTH * BATCH_SIZE


@dataclasses.dataclass(frozen=True)
class Size:
  """A model's size without its experts.

  Attributes:
    model_dim: D.
    num_heads: H, of 32 channels each.
    hidden_dim: F of a dense feed-forward network.
    segments: blocks, as in `ModelConfig`, where `FFN` stands for `dense` or `moe`.
  """

  model_dim: int
  num_heads: int
  hidden_dim: int
  segments: tuple[tuple[str, int], ...]


NANO = Size(64, 2, 256, (("attention:FFN", 2),))
TINY = Size(128, 4, 512, (("attention:dense attention:FFN", 2),))
# For one accelerator: 19 million active parameters, 65 million tokens.
SMALL = Size(512, 16, 2048, (("attention:FFN", 6),))
_SMALL_STEPS = 4000
_SMALL_POINT = {
  "batch_size": 128,
  "model.dtype": "bfloat16",
  "optimizer.learning_rate": 1e-3,
  "optimizer.warmup_steps": 400,
}


def language_model(
  size: Size,
  routing: RoutingConfig | None = None,
  *,
  expert_dim: int | None = None,
  moe: dict[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the mapping of a config; seed and steps are set by the profile.

  Args:
    size: of the model.
    routing: None = a dense model.
    expert_dim: F of an expert; None = that of a dense network.
    moe: further fields of the section `moe`.
  """
  kind = "dense" if routing is None else "moe"
  mapping = {
    "imports": (),
    "seed": 0,
    "steps": 0,
    "batch_size": BATCH_SIZE,
    "data": {"sources": tuple(DOMAINS.values()), "sequence_length": SEQUENCE_LENGTH},
    "model": _model(size, kind),
    "optimizer": {
      "name": "adamw",
      "learning_rate": 4e-3,
      "warmup_steps": 100,
      "final_fraction": 0.05,
      "weight_decay": 0.1,
      "clip_norm": 1.0,
      "b2": 0.95,
    },
    "eval": {"every": 1000, "batch_size": 0},
    "checkpoint": {"every": 1000, "keep": 1},
    "sharding": to_mapping(ShardingConfig()),
    "faults": to_mapping(FaultsConfig()),
    "log": {"every": 10},
  }
  if routing is None:
    return mapping
  experts = {
    "hidden_dim": size.hidden_dim if expert_dim is None else expert_dim,
    "gated": False,
    "activation": "relu",
    "router_init": "normal",
    "dispatch": _dispatch(routing),
  }
  return mapping | {"moe": {**experts, **to_mapping(routing), **(moe or {})}}


def on_gpu(configs: dict[str, dict[str, Any]]) -> Scale:
  """Returns the scale of the gpu profile of arms of the size SMALL."""
  return Scale(steps=_SMALL_STEPS, seeds=(0, 1, 2), configs=configs, point=_SMALL_POINT)


def _model(size: Size, kind: str) -> dict[str, Any]:
  return {
    "model_dim": size.model_dim,
    "segments": tuple((blocks.replace("FFN", kind), count) for blocks, count in size.segments),
    "num_heads": size.num_heads,
    "num_kv_heads": size.num_heads,
    "head_dim": 32,
    "mlp": {"hidden_dim": size.hidden_dim, "gated": False, "activation": "relu"},
    "init_scale": 0.1,
    "dtype": "float32",
    "scan_unroll": 2,
  }


def _dispatch(routing: RoutingConfig) -> str:
  if routing.selector.chooser == Chooser.SLOT:
    return "einsum"
  return "ragged" if routing.overflow == Overflow.DROPLESS else "gather"
