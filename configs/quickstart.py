"""Quickstart: a Switch-style language model on the bundled addresses, bytes in, bytes out.

Every other block holds 8 experts of which a token visits one (Switch, arXiv 2101.03961). Variants:

  configs/quickstart.py         the mixture of experts
  configs/quickstart.py:dense   the same active FLOPs: every feed-forward dense

Cost: 3,950 steps of 2,048 tokens (8.1 million, 2.4 epochs) took 5.1 minutes on 2 CPU cores,
evaluations included; 65 to 75 ms a step.

Result, 3 seeds: 1.078 nats per token held-out (1.555 bits per byte), dense 1.118 (1.613); see
experiments/quickstart.
"""

from ml_collections import config_dict

from moe_jax.config import to_mapping
from moe_jax.errors import UserError
from moe_jax.moe import preset
from moe_jax.sharding.config import ShardingConfig
from moe_jax.training.faults_config import FaultsConfig


def get_config(variant: str = "moe") -> config_dict.ConfigDict:
  """Returns the config of a variant."""
  if variant not in ("moe", "dense"):
    raise UserError(f"variant {variant!r} does not exist; expected moe or dense")
  config = config_dict.ConfigDict()
  config.imports = ()
  config.seed = 0
  config.steps = 3950
  config.batch_size = 16
  config.accumulation_steps = 1
  config.data = dict(
    corpus="sotu_1790_1870", sources=(), tokenizer="bytes", sequence_length=128, data_dir=""
  )

  blocks = "attention:dense attention:" + variant
  config.model = dict(
    model_dim=48,
    segments=((blocks, 2),),
    num_heads=1,
    num_kv_heads=1,
    head_dim=32,
    rope_theta=10_000.0,
    window=128,
    mlp=dict(hidden_dim=192, gated=False, activation="relu", dropout=0.0),
    tie_embeddings=False,
    dropout=0.0,
    init_scale=0.1,
    norm_epsilon=1e-6,
    dtype="float32",
    remat="none",
    scan_unroll=2,
  )
  if variant == "moe":
    config.moe = dict(
      hidden_dim=192,
      gated=False,
      activation="relu",
      expert_dropout=0.0,
      router_jitter=0.0,
      router_init="normal",
      dispatch="gather",
      **to_mapping(preset("switch", num_experts=8)),
    )
    config.moe.capacity = config_dict.placeholder(int)
    config.moe.group_size = config_dict.placeholder(int)

  config.optimizer = dict(
    name="adamw",
    learning_rate=4e-3,
    warmup_steps=100,
    final_fraction=0.05,
    weight_decay=0.1,
    clip_norm=1.0,
    b1=0.9,
    b2=0.95,
    epsilon=1e-8,
  )
  config.eval = dict(every=500, batch_size=0)
  config.checkpoint = dict(every=500, keep=2, keep_every=0, keep_best=0)
  config.sharding = to_mapping(ShardingConfig())
  config.repair = dict(every=0, threshold=0.1, init="copy", noise=0.01)
  config.balance_placement = dict(every=0, devices=0, nodes=1, spare=0, min_gain=0.05)
  config.faults = to_mapping(FaultsConfig())
  config.log = dict(every=10, tensorboard=False, wandb="", trackio="", profile=(0, 0))
  config.sample = dict(prompt="The President", max_new_tokens=400, temperature=0.7)
  curve = "experiments/quickstart/dense_baseline.json" if variant == "moe" else ""
  config.report = dict(baseline=curve)
  return config
