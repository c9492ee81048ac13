"""Meshes and tables of axes: what goes where, and what is refused."""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sharding.meshes import MESHES, mesh_layout

from moe_jax.errors import UserError
from moe_jax.layers.parameters import LOGICAL_AXES
from moe_jax.sharding.config import ShardingConfig
from moe_jax.sharding.layout import make_layout
from moe_jax.sharding.mesh import MESH_AXES, make_mesh
from moe_jax.sharding.rules import ACTIVATION_AXES, RULES, rules_of

ONE = dict.fromkeys(MESH_AXES, 1)
EXPERTS = ("expert", "expert_embed", "expert_mlp")


@pytest.mark.parametrize("name", RULES)
def test_tables_name_axes_that_exist(name):
  for axis, places in rules_of(name).items():
    assert axis in LOGICAL_AXES | ACTIVATION_AXES
    assert set(places) <= set(MESH_AXES)


@pytest.mark.parametrize(
  ("mesh", "axes", "spec"),
  [
    ("dp", EXPERTS, P(None, None, None)),
    ("fsdp", EXPERTS, P(None, "fsdp", None)),
    ("ep", EXPERTS, P("expert", None, None)),
    ("ep_tp", EXPERTS, P("expert", None, "tensor")),
    ("ep_fsdp", EXPERTS, P("expert", "fsdp", None)),
    ("ep_fsdp", ("embed", "mlp"), P("fsdp", None)),
    ("ep_wide", EXPERTS, P(("data", "expert"), "fsdp", None)),
    ("ep_wide", ("embed", "heads", "head_dim"), P("fsdp", None, None)),
    ("ep_fsdp_tp", ("vocab", "embed"), P("tensor", "fsdp")),
    ("ep_fsdp", ("batch", "length"), P(("data", "fsdp", "expert"), None)),
    ("ep_fsdp", ("expert", "slots", None), P("expert", ("data", "fsdp"), None)),
    ("ep_wide", ("expert", "slots", None), P(("data", "expert"), "fsdp", None)),
  ],
)
def test_axes_go_where_the_layout_says(mesh, axes, spec):
  assert mesh_layout(mesh).spec(axes, (16,) * len(axes)) == spec


def test_every_device_is_in_the_mesh_once():
  for name in MESHES:
    mesh = mesh_layout(name).mesh
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))
    assert mesh.axis_names == MESH_AXES


def test_one_size_may_be_the_rest():
  layout = make_layout(ShardingConfig(layout="ep_fsdp", fsdp=-1, expert=2), jax.devices())
  assert dict(layout.mesh.shape) == ONE | {"fsdp": 4, "expert": 2}


def test_a_mesh_of_one_is_no_layout():
  assert make_layout(ShardingConfig(), jax.devices()) is None


def test_slices_are_the_outer_part_of_their_axis():
  sizes = ONE | {"data": 4, "expert": 2}
  grid = make_mesh(sizes, jax.devices(), {"data": 2}).devices.reshape(4, 2)
  ids = np.vectorize(lambda device: device.id)(grid)
  assert {int(i) for i in ids[:2].flat} == {0, 1, 2, 3}


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"layout": "epfsdp"}, r"layout = 'epfsdp' is not one of .*did you mean ep_fsdp\?"),
    ({"layout": "ep", "fsdp": 2}, r"fsdp = 2 is refused: layout = ep .* use fsdp or .*ep_fsdp"),
    ({"layout": "fsdp", "fsdp": 0}, r"fsdp = 0 is refused: it must be at least 1, or -1"),
    ({"layout": "fsdp", "fsdp": -1, "data": -1}, r"data and fsdp are both -1: one axis alone"),
    ({"data": 4, "dcn_data": 3}, r"dcn_data = 3 is refused: it must divide data = 4"),
    ({"chunks": 0}, r"chunks = 0 is refused: it must be at least 1"),
    ({"exchange": "gather"}, r"exchange = 'gather' is not one of .*did you mean 'all_gather'\?"),
    ({"exchange": "compiler", "chunks": 2}, r"chunks = 2 is refused with exchange = compiler"),
    (
      {"layout": "ep", "expert": 8, "hierarchical": True},
      r"hierarchical = true is refused: layout = ep splits experts over expert,.*ep_wide",
    ),
  ],
)
def test_a_config_that_cannot_be_is_refused(fields, message):
  with pytest.raises(UserError, match=message):
    ShardingConfig(**fields)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"data": 3}, "a mesh of data = 3 has 3 devices, and there are 8.*nearest.*is 2"),
    ({"data": 16}, "a mesh of data = 16 has 16 devices, and there are 8.*nearest.*is 8"),
    ({"data": 4}, "a mesh of data = 4 has 4 devices, and there are 8.*one size may be -1"),
    ({"data": -1, "tensor": 5}, "a mesh of data = -1, tensor = 5 has 5 devices.*nearest.*is 4"),
  ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
  with pytest.raises(UserError, match=message):
    make_mesh(ONE | sizes, jax.devices())


@pytest.mark.parametrize(
  ("mesh", "axes", "shape", "message"),
  [
    ("ep", ("expert", None), (6, 4), "the axis expert of w has size 6, which expert = 4 does not"),
    (
      "ep_fsdp",
      ("batch", "length"),
      (6, 4),
      "the axis batch of w has size 6, which data = 2 x fsdp = 2 x expert = 2 = 8 does not divide:"
      " make it 8, or the mesh smaller",
    ),
    (
      "tp",
      ("vocab", "mlp"),
      (4, 4),
      r"w of shape .4, 4. cannot have both its axes vocab and mlp",
    ),
    ("tp", ("words",), (4,), "'words' is no logical axis"),
  ],
)
def test_an_array_that_the_mesh_cannot_hold_is_refused(mesh, axes, shape, message):
  with pytest.raises(UserError, match=message):
    mesh_layout(mesh).spec(axes, shape, "w")


def test_messages_are_one_sentence():
  with pytest.raises(UserError) as error:
    make_mesh(ONE | {"data": 3}, jax.devices())
  assert not re.search(r"\.\s|\n", str(error.value))


def test_parts_are_the_product_of_mesh_axes():
  layout = mesh_layout("ep_fsdp")
  assert layout.parts("batch") == math.prod(layout.mesh.shape.values())
