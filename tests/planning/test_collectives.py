"""Collectives of a printed program: kinds, bytes, groups, mesh axes, runs."""

import numpy as np
import pytest
from planning.pods import fake_mesh

from moe_jax.planning.collectives import (
  Collective,
  CollectiveKind,
  find_collectives,
  mesh_axes_of,
)
from moe_jax.planning.estimate import groups_along
from moe_jax.planning.hlo import parse_program
from moe_jax.planning.links import link_time
from moe_jax.planning.replica_groups import parse_groups

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: bf16[64,32]) -> bf16[8,32] {
  %p = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %inner = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%p), REDUCED, to_apply=%add
  ROOT %mine = bf16[8,32]{1,0} dynamic-slice(%inner), dynamic_slice_sizes={8,32}
}

%condition (c: (s32[], bf16[8,32])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[8,32]{1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(24)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (b: (s32[], bf16[8,32])) -> (s32[], bf16[8,32]) {
  %b.1 = (s32[]{:T(128)}, bf16[8,32]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%b.1), index=0
  %x = bf16[8,32]{1,0} get-tuple-element(%b.1), index=1
  %start = (bf16[8,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%x), GATHERED, dimensions={0}
  %whole = bf16[64,32]{1,0} all-gather-done(%start)
  %parts = (bf16[4,32]{1,0}, bf16[4,32]{1,0}) all-to-all(%x, %x), EXCHANGED
  %kept = bf16[8,32]{1,0} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[]{:T(128)}, bf16[8,32]{1,0}) tuple(%i.1, %kept)
}

ENTRY %main (x0: bf16[8,32]) -> f32[] {
  %x0 = bf16[8,32]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, bf16[8,32]{1,0}) tuple(%zero, %x0)
  %loop = (s32[]{:T(128)}, bf16[8,32]{1,0}) while(%init), condition=%condition, body=%body
  %loss = f32[]{:T(128)} constant(1)
  %alone = f32[] all-reduce(%loss), replica_groups={{0},{1}}, to_apply=%add
  ROOT %total = f32[] all-reduce(%loss), SUMMED, to_apply=%add
}
"""


GROUPS = {
  "REDUCED": "replica_groups=[8,8]<=[8,8]T(1,0)",
  "GATHERED": "replica_groups={{0,8,16,24,32,40,48,56},{1,9,17,25,33,41,49,57}}",
  "EXCHANGED": 'replica_groups={{0,1},{2,3}}, metadata={op_name="{0,1}"}',
  "SUMMED": "replica_groups=mesh['axis_0'=1,'axis_1'=64] {'axis_0','axis_1'}",
}


def test_every_form_is_found_with_bytes_axes_and_runs():
  mesh, _ = fake_mesh("v5p:4x4x4", fsdp=8, expert=8)
  text = PROGRAM
  for name, groups in GROUPS.items():
    text = text.replace(name, groups)
  found = [
    (each.kind.value, each.num_bytes, each.axes, each.runs, each.is_async)
    for each in find_collectives(parse_program(text), mesh)
  ]
  assert found == [
    # A gather is as large as what it makes; groups of one device are no exchange.
    ("all-gather", 64 * 32 * 2, ("fsdp",), 24, True),
    ("all-to-all", 2 * 8 * 32 * 2, ("expert",), 24, False),
    ("reduce-scatter", 64 * 32 * 2, ("fsdp",), 24, False),
    ("all-reduce", 4, ("fsdp", "expert"), 1, False),
  ]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("{}", [[0, 1, 2, 3]]),
    ("[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
  ],
)
def test_groups_in_all_notations(text, expected):
  assert parse_groups(text, 4).tolist() == expected


def test_groups_that_follow_no_axes_have_none():
  mesh, _ = fake_mesh("v5p:2x2x2", fsdp=4, expert=2)
  assert mesh_axes_of(np.array([[0, 1], [2, 3]]), mesh) == ("expert",)
  assert mesh_axes_of(np.array([[0, 3]]), mesh) == ()


def seconds(kind, num_bytes, axes, text="v5p:4x4x4", num_slices=1, **sizes):
  mesh, topology = fake_mesh(text, num_slices, **sizes)
  each = Collective(CollectiveKind(kind), num_bytes, axes, groups_along(mesh, axes), 1.0, "")
  return link_time(each, mesh, topology)


def test_link_times_by_hand():
  # v5p links carry 100 GB/s each way. expert = 4 is the last dimension: a ring of four.
  ring = dict(fsdp=16, expert=4)
  assert seconds("all-gather", 8e11, ("expert",), **ring).ici == pytest.approx(8 * 3 / 4 / 2)
  assert seconds("all-reduce", 8e11, ("expert",), **ring).ici == pytest.approx(2 * 8 * 3 / 4 / 2)
  assert seconds("all-to-all", 8e11, ("expert",), **ring).ici == pytest.approx(8 * 4 / 8)
  # fsdp = 16 are the two others, twice the links.
  assert seconds("all-gather", 8e11, ("fsdp",), **ring).ici == pytest.approx(8 * 15 / 16 / 4)
  # Half a ring is a line of one way; every second place shares its links with another group.
  half = dict(fsdp=32, expert=2)
  assert seconds("all-gather", 8e11, ("expert",), **half).ici == pytest.approx(8 / 2 / 1)
  other = dict(data=16, fsdp=2, expert=2)
  assert seconds("all-gather", 8e11, ("fsdp",), **other).ici == pytest.approx(8 / 2 / (2 / 2))


def test_slices_are_joined_by_the_network():
  sizes = dict(data=2, fsdp=64)
  across = seconds("all-reduce", 6.25e9, ("data",), num_slices=2, **sizes)
  # 50 Gbit/s are 6.25 GB/s; a device sends half of the sum and receives half of it.
  assert (across.ici, across.dcn) == (0.0, pytest.approx(1.0))


def test_what_passes_on_to_another_slice_crosses_the_network():
  mesh, topology = fake_mesh("v5p:4x4x4", 2, data=2, fsdp=64)
  times = []
  for pairs in ([[0, 1], [1, 0]], [[0, 1], [63, 64]]):
    each = Collective(CollectiveKind.PERMUTE, 6.25e9, (), np.array(pairs), 1.0, "")
    times.append(link_time(each, mesh, topology))
  assert (times[0].ici, times[0].dcn) == (pytest.approx(0.0625), 0.0)
  assert (times[1].ici, times[1].dcn) == (0.0, pytest.approx(1.0))
