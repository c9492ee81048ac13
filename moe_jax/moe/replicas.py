"""Replicas of hot experts: the plan and the weights of E experts over P physical slots.

Only what runs between the plan and the tokens' sums knows of replicas: the router, its losses,
metrics, capacity and drops are those of E experts, so outputs are too. There is one set of weights
and one optimiser memory, of E experts; a step copies weights into physical slots where it uses
them. Replicas can thus not drift apart: the gradient of a copy is the sum over its replicas. A new
table moves no state, and a checkpoint knows nothing of it. The price is that each step fetches the
weights of replicas and sums their gradients, which stored replicas would have to do as well.
"""

import dataclasses
import enum
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moe_jax.choices import as_choice
from moe_jax.errors import UserError
from moe_jax.moe.placement_balance import ExpertPlacement
from moe_jax.moe.plan import RoutingPlan
from moe_jax.sharding.layout import Axes, Layout


class Replica(enum.StrEnum):
  """Which replica of its expert an assignment goes to."""

  EVEN = "even"  # by its place in the expert's queue: replicas differ by one row in a group
  TOKEN = "token"  # by the token's place in its group, which spares dropless routing the queues
  # Of its own device, or the next one that has any: least traffic, but loads as they come.
  NEAREST = "nearest"


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["physical_to_logical", "logical_to_physical", "replicas"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class ReplicaTable:
  """The physical slots of one layer's experts, or of several with an axis in front.

  Attributes:
    physical_to_logical: (P,) int32, the expert whose weights a slot holds.
    logical_to_physical: (E, R) int32, the slots of each expert; what stands beyond its number of
      replicas is not read.
    replicas: (E,) int32, from 1 to R.
  """

  physical_to_logical: jax.Array
  logical_to_physical: jax.Array
  replicas: jax.Array


def replica_table(placement: ExpertPlacement) -> ReplicaTable:
  """Returns the tables of X layers, R being the most that P slots allow.

  So tables of any loads have the same shapes, and a program runs with all of them.
  """
  layers, num_experts, found = placement.logical_to_physical.shape
  spare = placement.physical_to_logical.shape[1] - num_experts
  slots = np.full((layers, num_experts, spare + 1), -1, np.int32)
  slots[..., :found] = placement.logical_to_physical
  return ReplicaTable(*map(jnp.asarray, (placement.physical_to_logical, slots, placement.replicas)))


def table_of_copies(copied: jax.Array, num_experts: int, num_devices: int) -> ReplicaTable:
  """Returns the table of devices that hold experts of their own and copies behind them.

  Args:
    copied: (spare,) int32, the expert that each spare slot holds, device by device; see
      `moe_jax.moe.placement_balance.place_with_replicas`.
    num_experts: E; device d has experts d * E / devices and so on.
    num_devices: divides E and `spare`.
  """
  own = jnp.arange(num_experts, dtype=jnp.int32).reshape(num_devices, -1)
  held = jnp.concatenate([own, copied.reshape(num_devices, -1)], axis=1).reshape(-1)
  P = held.size
  # How many slots before it hold the same expert.
  rank = jnp.sum(jnp.tril(held[:, None] == held[None], k=-1), axis=1)
  slots = jnp.full((num_experts, copied.size + 1), -1, jnp.int32)
  slots = slots.at[held, rank].set(jnp.arange(P, dtype=jnp.int32))
  return ReplicaTable(held, slots, jnp.bincount(held, length=num_experts).astype(jnp.int32))


def fetch_copies(
  weights: dict[str, jax.Array], copied: jax.Array, axes: dict[str, Axes], layout: Layout
) -> dict[str, jax.Array]:
  """Returns the (P, ...) weights of `table_of_copies`, each device's own and its copies.

  Only copies travel: every device contributes those of its experts to a reduce-scatter, which a
  lookup over split experts would make an all-gather of all of them. Backward, an all-gather brings
  the gradients of copies home, where they are summed.

  Args:
    weights: (E, ...), in the dtype in which they are used.
    copied: (spare,) int32, see `table_of_copies`.
    axes: the logical axes of each weight.
    layout: splits experts.
  """
  specs = {name: layout.spec(axes[name], weights[name].shape, name) for name in weights}
  names = layout.mesh_axes("expert")

  def on_device(weights, copied):
    return {name: _own_and_copies(w, copied, names) for name, w in weights.items()}

  run = jax.shard_map(
    on_device,
    mesh=layout.mesh,
    in_specs=(specs, PartitionSpec()),
    out_specs=specs,
    check_vma=False,
  )
  return run(weights, copied)


def _own_and_copies(weight: jax.Array, copied: jax.Array, names: tuple[str, ...]) -> jax.Array:
  """Returns (slots of a device, ...): its own experts (E / devices, ...) and its copies."""
  place = copied - jax.lax.axis_index(names) * weight.shape[0]
  mine = (place >= 0) & (place < weight.shape[0])
  sent = weight[jnp.clip(place, 0, weight.shape[0] - 1)]
  sent = jnp.where(mine.reshape(-1, *(1,) * (weight.ndim - 1)), sent, 0)
  copies = jax.lax.psum_scatter(sent, names, scatter_dimension=0, tiled=True)
  return jnp.concatenate([weight, copies])


def replicate_plan(
  plan: RoutingPlan,
  table: ReplicaTable,
  *,
  replica: Replica = Replica.EVEN,
  num_devices: int | None = None,
) -> RoutingPlan:
  """Returns the plan over P physical experts: the same assignments, each to one replica.

  Order, slots, weights and validity stay, so every form of dispatch sums what it summed, in the
  same order; slots that an expert's assignments do not share, its replicas' do not either. Losses
  and metrics stay those of E experts. C stays: an expert without further replicas may fill it.

  Args:
    plan: over E experts.
    table: of this layer.
    replica: see `Replica`.
    num_devices: for `nearest`; devices hold equal numbers of consecutive groups, or equal parts of
      a group's tokens where there are fewer groups, and of consecutive slots.

  Raises:
    UserError: a table of another number of experts, or tokens or slots that devices cannot share.
  """
  E, P = plan.num_experts, table.physical_to_logical.shape[-1]
  if table.replicas.shape != (E,):
    raise UserError(f"the table has replicas of shape {table.replicas.shape}; expected ({E},)")
  replica = as_choice(Replica, "replica", replica)
  # A null expert, from E on, is looked up nowhere.
  expert = jnp.minimum(plan.expert, E - 1)
  group = jnp.arange(plan.expert.shape[0], dtype=jnp.int32)[:, None]
  if replica == Replica.NEAREST:
    chosen = _nearest(plan, expert, table, num_devices)
  else:
    # Starting elsewhere in each group, so that short queues do not all end at the first replica.
    place = group + (plan.slot if replica == Replica.EVEN else plan.token)
    chosen = table.logical_to_physical[expert, place % table.replicas[expert]]
  physical = jnp.where(plan.expert < E, chosen, plan.expert + (P - E))
  return dataclasses.replace(plan, expert=physical, num_experts=P)


def replicate_weights(weights: dict[str, jax.Array], table: ReplicaTable) -> dict[str, jax.Array]:
  """Returns (P, ...) weights of physical experts from (E, ...) of logical ones.

  Backward, the gradients of replicas are summed.
  """
  return {name: value[table.physical_to_logical] for name, value in weights.items()}


def _nearest(plan, expert, table: ReplicaTable, num_devices: int | None) -> jax.Array:
  """Returns (G, N) int32: the first slot of the expert at the token's device or after it."""
  E, P = table.replicas.shape[0], table.physical_to_logical.shape[0]
  home = _devices_of_tokens(plan, P, num_devices)
  slots_per_device = P // num_devices
  used = jnp.arange(table.logical_to_physical.shape[1])[None] < table.replicas[:, None]
  device_ER = table.logical_to_physical // slots_per_device
  device_DER = (device_ER[None] - jnp.arange(num_devices)[:, None, None]) % num_devices
  # Of two replicas at one device the first.
  nearest_DE = jnp.argmin(jnp.where(used[None], device_DER, num_devices), axis=-1)
  chosen_DE = table.logical_to_physical[jnp.arange(E)[None], nearest_DE]
  return chosen_DE[home, expert]


def _devices_of_tokens(plan: RoutingPlan, num_physical: int, num_devices: int | None) -> jax.Array:
  """Returns (G, N) int32, the device that has the token of each assignment."""
  G, S = plan.token.shape[0], plan.num_tokens
  if num_devices is None or num_devices < 1:
    raise UserError(f"num_devices = {num_devices} is refused: replica = nearest needs their number")
  for what, number in {"tokens": G * S, "physical experts": num_physical}.items():
    if number % num_devices:
      raise UserError(f"num_devices = {num_devices} is refused: it must divide {number} {what}")
  token = plan.token + S * jnp.arange(G, dtype=jnp.int32)[:, None]
  return token // (G * S // num_devices)
