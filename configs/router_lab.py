"""Router laboratory: the quickstart's model under any router preset, for ablations.

  configs/router_lab.py                  switch
  configs/router_lab.py:expert_choice    experts take tokens
  configs/router_lab.py:deepseek_v3      sigmoid scores, selection bias, expert groups
  configs/router_lab.py:remoe            ReLU scores, a variable number of experts
  configs/router_lab.py:soft_moe         slots mix all tokens of a sequence
  configs/router_lab.py:shazeer          learned noise, importance and load losses
  configs/router_lab.py:hash             by token id
  configs/router_lab.py:grin             SparseMixer

Any name of `moe-jax conventions` is a variant. A preset keeps its paper's stages; what sets the
scale is common: 8 experts, at most 2 a token, expert groups in pairs, and routing groups of one
sequence where routers look at whole groups.

Cost: that of the quickstart (5 minutes on 2 CPU cores), up to twice that with two experts a token.
No result is recorded yet: a comparison of routers needs seeds and error bars.
"""

import dataclasses

from ml_collections import config_dict

from moe_jax.config import to_mapping
from moe_jax.moe import Overflow, RoutingConfig, preset
from moe_jax.moe.registry import Chooser
from moe_jax.sharding.config import ShardingConfig
from moe_jax.training.faults_config import FaultsConfig

NUM_EXPERTS = 8


def get_config(name: str = "switch") -> config_dict.ConfigDict:
  """Returns the config of a router preset."""
  config = config_dict.ConfigDict()
  config.imports = ()
  config.seed = 0
  config.steps = 3950
  config.batch_size = 16
  config.accumulation_steps = 1
  config.data = dict(
    corpus="sotu_1790_1870", sources=(), tokenizer="bytes", sequence_length=128, data_dir=""
  )
  config.model = dict(
    model_dim=48,
    segments=(("attention:dense attention:moe", 2),),
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
  routing = scaled_down(name)
  dispatch = "ragged" if routing.overflow == Overflow.DROPLESS else "gather"
  if routing.selector.chooser == Chooser.SLOT:
    dispatch = "einsum"
  config.moe = dict(
    hidden_dim=192,
    gated=False,
    activation="relu",
    expert_dropout=0.0,
    shared_hidden_dim=0,
    shared_combine="add",
    router_jitter=0.0,
    router_init="normal",
    dispatch=dispatch,
    **to_mapping(routing),
  )
  for field in dataclasses.fields(RoutingConfig):
    # A field that is None has no type of its own, by which a command line could set it.
    if config.moe[field.name] is None:
      config.moe[field.name] = config_dict.placeholder(int if field.type == int | None else float)
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
  config.repair = dict(every=0)
  config.balance_placement = dict(every=0, devices=0, nodes=1, spare=0, min_gain=0.05)
  config.eval = dict(every=500, batch_size=0)
  config.checkpoint = dict(every=500, keep=2, keep_every=0, keep_best=0)
  config.sharding = to_mapping(ShardingConfig())
  config.faults = to_mapping(FaultsConfig())
  config.log = dict(every=10, tensorboard=False, wandb="", trackio="", profile=(0, 0))
  config.sample = dict(prompt="The President", max_new_tokens=400, temperature=0.7)
  config.report = dict(baseline="experiments/quickstart/dense_baseline.json")
  return config


def scaled_down(name: str) -> RoutingConfig:
  """Returns the preset with 8 experts of which a token takes at most 2."""
  own = preset(name)
  changes = dict(num_experts=NUM_EXPERTS, top_k=min(own.top_k, 2))
  if own.num_expert_groups > 1:
    changes |= dict(num_expert_groups=2, top_expert_groups=1)
  if own.selector.chooser == Chooser.SLOT:
    # As many slots as a sequence has tokens cost what one expert a token costs.
    changes |= dict(capacity=16)
  if not own.selector.causal:
    changes |= dict(grouping="sequence", group_size=None)
  return preset(name, **changes)
