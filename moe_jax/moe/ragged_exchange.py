"""The exchange of `ragged` dispatch: exactly the rows that experts are to read, none of padding."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch import Dispatch, get_dispatcher
from moe_jax.moe.experts import ExpertForm, Weights, apply_plan
from moe_jax.moe.moves import collect, look_up
from moe_jax.moe.options import WeightOn
from moe_jax.moe.plan import RoutingPlan

# Where XLA has the collective itself; its CPU backend does not.
_NATIVE = ("tpu", "gpu")


def exchange_ragged(
  x: jax.Array,
  plan: RoutingPlan,
  weights: Weights,
  key: jax.Array | None,
  form: ExpertForm,
  axes: tuple[str, ...],
  platform: str,
) -> jax.Array:
  """Returns the sums (g, S, D) of a device's tokens, whose experts lie on the devices of `axes`.

  A device has room for all rows that can reach it, so nothing is dropped: for every other device
  as many as its tokens can ask of one device's experts.

  Args:
    x: (g, S, D), the device's tokens.
    plan: of these groups, over all E experts.
    weights: of the device's own experts.
    key: turns dropout on.
    form: how experts work.
    axes: the mesh axes that experts are split over.
    platform: of the mesh.
  """
  own = weights["up"].shape[0]
  rows = get_dispatcher(Dispatch.RAGGED).dispatch(x, plan)
  counts = jax.lax.all_gather(rows.rows_per_expert, axes).reshape(-1, plan.num_experts // own, own)
  me = jax.lax.axis_index(axes)
  there = Trip.between(jnp.sum(counts, axis=-1), me)
  weight, sent = rows.weight.astype(jnp.float32), rows.rows
  if plan.weight_on == WeightOn.INPUT:
    factor = look_up(weight, rows.moves.assignment)[:, None]
    sent, weight = (sent.astype(jnp.float32) * factor).astype(x.dtype), jnp.ones_like(weight)
  room = jnp.zeros((counts.shape[0] * _most_rows(plan, own), x.shape[-1]), x.dtype)
  arrived = there.send(sent, room, axes, platform)
  results = apply_plan(arrived[None], _arrival_plan(counts[:, me], len(room)), weights, key, form)
  back = there.back().send(results[0], jnp.zeros_like(sent), axes, platform)
  return collect(back, weight, rows.moves).reshape(x.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trip:
  """Which rows this device sends to each of n others, all (n,) int32.

  Attributes:
    input_offsets, send_sizes: its rows for each, consecutive.
    output_offsets: where they go on each.
    recv_sizes: rows that arrive from each.
    arrival_offsets: where those go here.
    origin_offsets: where they came from on each.
  """

  input_offsets: jax.Array
  send_sizes: jax.Array
  output_offsets: jax.Array
  recv_sizes: jax.Array
  arrival_offsets: jax.Array
  origin_offsets: jax.Array

  @classmethod
  def between(cls, sizes: jax.Array, me: jax.Array) -> "Trip":
    """Returns the trip of device `me`; `sizes` (n, n) are rows by source and destination."""
    starts = jnp.cumsum(sizes, axis=1) - sizes
    places = jnp.cumsum(sizes, axis=0) - sizes
    return cls(starts[me], sizes[me], places[me], sizes[:, me], places[:, me], starts[:, me])

  def back(self) -> "Trip":
    """Returns the trip of the same rows to where they came from."""
    return Trip(
      self.arrival_offsets,
      self.recv_sizes,
      self.origin_offsets,
      self.send_sizes,
      self.input_offsets,
      self.output_offsets,
    )

  def send(
    self, rows: jax.Array, room: jax.Array, axes: tuple[str, ...], platform: str
  ) -> jax.Array:
    """Returns `room` with the rows that arrived in it."""
    exchange = jax.lax.ragged_all_to_all if platform in _NATIVE else padded_ragged_all_to_all
    name = axes[0] if len(axes) == 1 else axes
    sizes = self.input_offsets, self.send_sizes, self.output_offsets, self.recv_sizes
    return exchange(rows, room, *sizes, axis_name=name)


def padded_ragged_all_to_all(
  operand: jax.Array,
  output: jax.Array,
  input_offsets: jax.Array,
  send_sizes: jax.Array,
  output_offsets: jax.Array,
  recv_sizes: jax.Array,
  *,
  axis_name: str | tuple[str, ...],
) -> jax.Array:
  """Does what `jax.lax.ragged_all_to_all` does, on any platform, by an all-to-all of equal blocks.

  Each block has room for all rows of the operand, so it moves n times as much.

  Args:
    operand: (R, D) rows; slice i of it goes to device i.
    output: (M, D), what is there before; returned where nothing arrives.
    input_offsets, send_sizes: (n,) int32, where slice i begins and how many rows it has.
    output_offsets: (n,) int32, where in device i's output this device's slice begins.
    recv_sizes: (n,) int32, rows that arrive from each device.
    axis_name: the devices.
  """
  place = jnp.arange(operand.shape[0], dtype=jnp.int32)[None]
  index = input_offsets[:, None] + place
  blocks = look_up(operand, jnp.where(place < send_sizes[:, None], index, operand.shape[0]))
  blocks = jax.lax.all_to_all(blocks, axis_name, split_axis=0, concat_axis=0, tiled=True)
  starts = jax.lax.all_to_all(output_offsets, axis_name, split_axis=0, concat_axis=0, tiled=True)
  to = jnp.where(place < recv_sizes[:, None], starts[:, None] + place, output.shape[0])
  return output.at[to].set(blocks, mode="drop")


def _most_rows(plan: RoutingPlan, own: int) -> int:
  """Returns the most rows that one device's tokens can ask of another's `own` experts."""
  groups, tokens = plan.token.shape[0], plan.token.shape[0] * plan.num_tokens
  slots = groups * own * plan.capacity
  return min(slots, tokens * min(own, plan.top_k or own))


def _arrival_plan(counts: jax.Array, num_rows: int) -> RoutingPlan:
  """Returns the plan of one group, the rows that arrived: each has one expert and the weight 1.

  `counts` (n, own) are the rows from each device for each own expert, in the order of arrival.
  """
  row, own = jnp.arange(num_rows, dtype=jnp.int32), counts.shape[1]
  block = jnp.searchsorted(jnp.cumsum(counts.reshape(-1)), row, side="right").astype(jnp.int32)
  valid = row < jnp.sum(counts)
  return RoutingPlan(
    token=row[None],
    expert=jnp.where(valid, block % own, 0)[None],
    slot=row[None],
    weight=valid.astype(jnp.float32)[None],
    valid=valid[None],
    identity=None,
    losses={},
    metrics={},
    num_tokens=num_rows,
    num_experts=own,
    capacity=num_rows,
    top_k=1,
  )
