"""Meshes of eight devices, one for each way that a layout can split a tiny model."""

import jax

from moe_jax.sharding.config import ShardingConfig
from moe_jax.sharding.layout import Layout, make_layout

MESHES = {
  "dp": {"layout": "dp", "data": 8},
  "fsdp": {"layout": "fsdp", "data": 2, "fsdp": 4},
  "tp": {"layout": "tp", "data": 4, "tensor": 2},
  "fsdp_tp": {"layout": "fsdp_tp", "fsdp": 4, "tensor": 2},
  "ep": {"layout": "ep", "data": 2, "expert": 4},
  "ep_tp": {"layout": "ep_tp", "expert": 4, "tensor": 2},
  "ep_fsdp": {"layout": "ep_fsdp", "data": 2, "fsdp": 2, "expert": 2},
  "ep_fsdp_tp": {"layout": "ep_fsdp_tp", "fsdp": 2, "expert": 2, "tensor": 2},
  "ep_wide": {"layout": "ep_wide", "data": 2, "fsdp": 2, "expert": 2},
  "ep_context": {"layout": "ep", "data": 2, "expert": 2, "sequence": 2},
  "context": {"layout": "fsdp", "fsdp": 2, "sequence": 4},
  "ep_wide_tp": {"layout": "ep_wide_tp", "data": 2, "expert": 2, "tensor": 2},
}


def mesh_layout(name: str, **changes) -> Layout:
  """Returns the layout of that name on eight devices."""
  return make_layout(ShardingConfig(**MESHES[name] | changes), jax.devices())
