"""The training step as the TPU compiler has it: where gradients are summed, and how."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from training.tiny import experiment

from moe_jax.planning.collectives import CollectiveKind, find_collectives
from moe_jax.planning.hlo import parse_program
from moe_jax.planning.topology import parse_topology
from moe_jax.sharding.config import ShardingConfig
from moe_jax.sharding.layout import make_layout
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.placed import batch_axes
from moe_jax.training.state import abstract_state
from moe_jax.training.step import make_train_step

B, L, D, V = 64, 128, 1024, 8192
FIELDS = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


def _collectives(sharding):
  config = experiment(
    batch_size=B,
    data__sequence_length=L,
    model__vocab_size=V,
    model__model_dim=D,
    model__num_heads=2,
    model__num_kv_heads=2,
    model__head_dim=128,
    model__dtype="bfloat16",
    moe__num_experts=16,
    moe__hidden_dim=256,
    moe__grouping="fixed",
    moe__group_size=L,
  )
  config = dataclasses.replace(config, sharding=sharding)
  layout = make_layout(sharding, parse_topology("v5e:2x4").devices())
  optimizer = make_optimizer(config.optimizer, config.steps)
  state = abstract_state(config.model, optimizer, layout=layout)
  place = layout.sharding(("batch", "length"), (B, L))
  assert batch_axes("tokens") == ("batch", "length")
  batch = {name: jax.ShapeDtypeStruct((B, L), jnp.int32, sharding=place) for name in FIELDS}
  compiled = make_train_step(config, optimizer, layout).lower(state, batch).compile()
  sizes = [math.prod(a.shape) for a in jax.tree.leaves(state.params)]
  return find_collectives(parse_program(compiled.as_text()), layout.mesh), sizes


@pytest.mark.slow
@pytest.mark.parametrize(
  "sharding",
  [
    # Of all dimensions of the torus XLA makes all-reduces, see `moe_jax.sharding.rules`.
    ShardingConfig(layout="fsdp", data=2, fsdp=4),
    ShardingConfig(layout="ep_fsdp", fsdp=4, expert=2),
  ],
  ids=lambda sharding: sharding.layout,
)
def test_gradients_are_reduce_scattered_under_fsdp(sharding):
  pytest.importorskip("libtpu", reason="libtpu, which compiles for TPU anywhere, is not installed")
  collectives, sizes = _collectives(sharding)
  # Half of a matrix of the smallest kind, in bfloat16: norms, losses and counts stay below.
  large = 2 * sorted(size for size in sizes if size > 10 * D)[0] / 2
  summed = [each for each in collectives if each.kind == CollectiveKind.REDUCE_SCATTER]
  whole = [
    each
    for each in collectives
    if each.kind == CollectiveKind.ALL_REDUCE and "fsdp" in each.axes and each.num_bytes >= large
  ]
  assert any("fsdp" in each.axes for each in summed)
  assert whole == []
