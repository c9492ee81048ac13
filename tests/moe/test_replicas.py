"""Replicas of hot experts: outputs and gradients are those without, loads are even."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fast_compilation import compile_fast  # noqa: F401
from sharding.meshes import mesh_layout

from moe_jax.errors import UserError
from moe_jax.layers.mlp import FeedForwardConfig
from moe_jax.moe import Dispatch, RoutingConfig, route
from moe_jax.moe.expert_parallel import expert_parallel
from moe_jax.moe.experts import ExpertForm, apply_plan
from moe_jax.moe.placement_balance import Devices, imbalance, place_replicas
from moe_jax.moe.replicas import (
  Replica,
  fetch_copies,
  replica_table,
  replicate_plan,
  replicate_weights,
  table_of_copies,
)
from moe_jax.sharding.context import use_layout

G, S, E, D, F, SPARE, DEVICES = 8, 64, 64, 4, 4, 16, 8
AXES = {
  "up": ("expert", "expert_embed", "expert_mlp"),
  "down": ("expert", "expert_mlp", "expert_embed"),
}


def form(dispatch: str) -> ExpertForm:
  return ExpertForm(FeedForwardConfig(F), Dispatch(dispatch))


@functools.cache
def zipf_case(overflow: str = "dropless", **fields):
  """Returns (x, weights, plan, table) of a router that draws experts by Zipf(1.0)."""
  rng = np.random.default_rng(0)
  config = RoutingConfig(num_experts=E, **{"top_k": 1, "overflow": overflow} | fields)
  share = rng.permutation(1.0 / np.arange(1, config.num_logits + 1))
  # The largest of log-shares plus Gumbel noise are draws by share.
  logits = np.log(share) + rng.gumbel(size=(G, S, config.num_logits))
  mask = jnp.asarray(rng.random((G, S)) < 0.9)
  plan = jax.jit(lambda logits: route(logits, config, token_mask=mask))(jnp.float32(logits))
  load = np.asarray(plan.metrics["load"])[None]
  table = replica_table(place_replicas(load, Devices(DEVICES), spare=SPARE))
  x = jnp.asarray(rng.standard_normal((G, S, D)), jnp.float32)
  weights = {
    "up": jnp.asarray(rng.standard_normal((E, D, F)), jnp.float32),
    "down": jnp.asarray(rng.standard_normal((E, F, D)), jnp.float32),
  }
  return x, weights, plan, jax.tree.map(lambda a: a[0], table)


def with_replicas(x, weights, plan, table, form, replica="even"):
  num_devices = DEVICES if replica == "nearest" else None
  plan = replicate_plan(plan, table, replica=replica, num_devices=num_devices)
  return apply_plan(x, plan, replicate_weights(weights, table), None, form)


def alone(x, weights, plan, form):
  return apply_plan(x, plan, weights, None, form)


def rows_per_device(plan) -> np.ndarray:
  """Returns (DEVICES,) the rows that each device's experts compute."""
  rows = np.bincount(np.asarray(plan.expert)[np.asarray(plan.valid)], minlength=plan.num_experts)
  return rows.reshape(DEVICES, -1).sum(axis=1)


def test_zipf_loads_over_8_devices_are_even_and_outputs_equal():
  x, weights, plan, table = zipf_case()
  before = imbalance(rows_per_device(plan)[None])[0]
  after = imbalance(rows_per_device(replicate_plan(plan, table))[None])[0]
  assert before > 1.5
  assert after <= 1.1
  run = jax.jit(lambda apply, *args: apply(*args, form("gather")), static_argnums=0)
  got = run(with_replicas, x, weights, plan, table)
  np.testing.assert_array_equal(got, run(alone, x, weights, plan))


@pytest.mark.parametrize(
  "dispatch, replica, fields",
  [
    ("gather", "even", dict(overflow="drop", top_k=2)),
    ("einsum", "token", dict(overflow="drop", top_k=2, num_null_experts=4)),
    ("ragged", "even", dict(top_k=2)),
    ("gather", "nearest", dict(selection="expert_choice", overflow="drop")),
  ],
)
def test_outputs_and_gradients_are_those_of_the_experts_themselves(dispatch, replica, fields):
  x, weights, plan, table = zipf_case(**fields)
  target = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

  def loss(x, weights, weight, apply):
    own = dataclasses.replace(plan, weight=weight)
    y = apply(x, own, weights)
    return jnp.sum(y * target), y

  def plain(x, own, weights):
    return apply_plan(x, own, weights, None, form(dispatch))

  def replicated(x, own, weights):
    return with_replicas(x, weights, own, table, form(dispatch), replica)

  (want, y), (got, new) = (
    jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)(
      x, weights, plan.weight, apply
    )
    for apply in (plain, replicated)
  )
  # Sums over tokens: those of an expert are now sums over its replicas' sums.
  for a, b in zip(jax.tree.leaves((got, new)), jax.tree.leaves((want, y)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b)))


@pytest.mark.parametrize("replica", list(Replica))
def test_no_two_assignments_share_a_slot_of_a_replica(replica):
  _, _, plan, table = zipf_case(overflow="drop", top_k=2)
  new = replicate_plan(plan, table, replica=replica, num_devices=DEVICES)
  np.testing.assert_array_equal(new.valid, plan.valid)
  assert new.capacity == plan.capacity and new.num_experts == E + SPARE
  group = np.broadcast_to(np.arange(G)[:, None], plan.token.shape)
  taken = np.stack([group, new.expert, new.slot], axis=-1)[np.asarray(new.valid)]
  assert len(np.unique(taken, axis=0)) == len(taken)
  assert (taken[:, 2] < plan.capacity).all()
  logical = np.asarray(table.physical_to_logical)[taken[:, 1]]
  np.testing.assert_array_equal(logical, np.asarray(plan.expert)[np.asarray(plan.valid)])


def test_replicas_of_an_expert_share_its_rows_evenly():
  _, _, plan, table = zipf_case()
  new = replicate_plan(plan, table)
  rows = np.bincount(np.asarray(new.expert)[np.asarray(new.valid)], minlength=E + SPARE)
  for expert, count in enumerate(np.asarray(table.replicas)):
    own = rows[np.asarray(table.logical_to_physical)[expert, :count]]
    # One row more or less in each of the groups.
    assert np.ptp(own) <= G


def test_the_nearest_replica_is_on_the_tokens_own_device_if_there_is_one():
  _, _, plan, table = zipf_case()
  new = replicate_plan(plan, table, replica="nearest", num_devices=DEVICES)
  device = np.asarray(new.expert) // ((E + SPARE) // DEVICES)
  slots = np.asarray(table.physical_to_logical).reshape(DEVICES, -1)
  for group, (experts, devices) in enumerate(zip(np.asarray(plan.expert), device, strict=True)):
    for expert, where in zip(experts, devices, strict=True):
      # A device holds one group here, of its own number.
      assert where == group or expert not in slots[group]
      between = [d % DEVICES for d in range(group, group + (where - group) % DEVICES)]
      assert not any(expert in slots[d] for d in between)


def test_physical_experts_are_exchanged_as_any_others():
  x, weights, plan, table = zipf_case(overflow="drop", top_k=2)
  layout = mesh_layout("ep_fsdp")

  def run(x, weights, plan, table):
    with use_layout(layout):
      plan, weights = replicate_plan(plan, table), replicate_weights(weights, table)
      return expert_parallel(x, plan, weights, AXES, None, form("gather"), layout)

  want = jax.jit(lambda *args: alone(*args, form("gather")))(x, weights, plan)
  got = jax.jit(run)(x, weights, plan, table)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.max(np.abs(want)))


def test_one_program_runs_with_all_tables():
  tables = [
    replica_table(place_replicas(np.random.default_rng(s).random((2, 16)), Devices(4), spare=8))
    for s in (0, 1)
  ]
  shapes = [jax.tree.map(jnp.shape, table) for table in tables]
  assert shapes[0] == shapes[1]
  assert tables[0].logical_to_physical.shape == (2, 16, 9)


@pytest.mark.parametrize(
  "change, match",
  [
    (dict(replica="neares"), "neares.*nearest"),
    (dict(replica="nearest"), "num_devices = None is refused"),
    (dict(replica="nearest", num_devices=7), "it must divide 512 tokens"),
    (dict(replica="nearest", num_devices=32), "it must divide 80 physical experts"),
  ],
)
def test_replicas_that_cannot_be_are_refused(change, match):
  _, _, plan, table = zipf_case()
  with pytest.raises(UserError, match=match):
    replicate_plan(plan, table, **change)
  with pytest.raises(UserError, match=r"replicas of shape \(8,\); expected \(64,\)"):
    replicate_plan(plan, dataclasses.replace(table, replicas=table.replicas[:8]))


def test_only_copies_travel_and_their_gradients_come_home():
  x, weights, plan, _ = zipf_case(top_k=2)
  # Experts over two mesh axes, their widths over a third.
  layout, own = mesh_layout("ep_wide"), form("ragged")
  copied = jnp.asarray(np.argsort(-np.asarray(plan.metrics["load"]))[:SPARE], jnp.int32)
  target = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

  def loss(weights, copied):
    with use_layout(layout):
      parts = layout.parts("expert")
      used = replicate_plan(plan, table_of_copies(copied, E, parts))
      fetched = fetch_copies(weights, copied, AXES, layout)
      y = expert_parallel(x, used, fetched, AXES, None, own, layout)
    return jnp.sum(y * target), y

  def plain(weights):
    y = apply_plan(x, plan, weights, None, own)
    return jnp.sum(y * target), y

  places = {name: layout.sharding(AXES[name], w.shape) for name, w in weights.items()}
  run = jax.jit(jax.grad(loss, has_aux=True))
  got = run(jax.device_put(weights, places), copied)
  want = jax.jit(jax.grad(plain, has_aux=True))(weights)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b)))


def test_a_table_of_copies_has_own_experts_first():
  table = table_of_copies(jnp.array([3, 0, 0, 0]), 4, 2)
  # Two devices: experts 0 and 1, then 3 and 0; experts 2 and 3, then 0 twice.
  np.testing.assert_array_equal(table.physical_to_logical, [0, 1, 3, 0, 2, 3, 0, 0])
  np.testing.assert_array_equal(table.replicas, [4, 1, 1, 2])
  np.testing.assert_array_equal(
    table.logical_to_physical,
    [[0, 3, 6, 7, -1], [1, -1, -1, -1, -1], [4, -1, -1, -1, -1], [2, 5, -1, -1, -1]],
  )
