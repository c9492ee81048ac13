"""Expert parallelism: from routed tokens to their experts' sums, on every device of a mesh.

What lies between the plan and the tokens' sums runs on each device by itself (`jax.shard_map`): it
dispatches its own groups, exchanges rows with the devices that hold their experts, applies its own
experts and exchanges back. Routing stands outside, on arrays that the compiler splits, so losses,
metrics and drops are those of the whole batch whatever the mesh is. A device holds whole routing
groups: capacity is a property of the config and never of the mesh.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.errors import UserError
from moe_jax.moe.config import RoutingConfig
from moe_jax.moe.dispatch import Dispatch, Plan, SlottedRows, get_dispatcher
from moe_jax.moe.experts import ExpertForm, Weights, apply_experts, apply_plan
from moe_jax.moe.grouped import GroupedKernel, platform_kernel
from moe_jax.moe.groups import to_groups
from moe_jax.moe.plan import DensePlan, RoutingPlan
from moe_jax.moe.ragged_exchange import exchange_ragged
from moe_jax.moe.registry import Chooser
from moe_jax.sharding.config import Exchange, ShardingConfig
from moe_jax.sharding.context import constrain
from moe_jax.sharding.layout import Axes, Layout
from moe_jax.sharding.local import map_groups


def expert_parallel(
  x: jax.Array,
  plan: Plan,
  weights: Weights,
  axes: dict[str, Axes],
  key: jax.Array | None,
  form: ExpertForm,
  layout: Layout,
) -> jax.Array:
  """Returns each token's weighted sum over its experts, (G, S, D), as `apply_plan` would.

  Dropout draws other masks than on one device.

  Args:
    x: (G, S, D) tokens.
    plan: of those groups.
    weights: (E, ...) arrays.
    axes: the logical axes of each weight.
    key: turns dropout on.
    form: how experts work.
    layout: the mesh; its `exchange` says how tokens travel.

  Raises:
    UserError: groups or experts that the mesh does not divide, or an exchange that cannot carry
      out the form of dispatch.
  """
  check_exchange(form.dispatch, layout.config)
  if layout.config.exchange == Exchange.COMPILER:
    return _by_compiler(x, _bare(plan), weights, key, form, layout)
  if form.kernel == GroupedKernel.AUTO:
    form = dataclasses.replace(form, kernel=platform_kernel(layout.platform))
  shape = x.shape
  x, plan, split = _whole_groups(x, _bare(plan), form, layout)
  own = _Device(layout, form, split)
  specs = {name: layout.spec(axes[name], weights[name].shape, name) for name in weights}
  by_group = PartitionSpec(own.groups or None)
  run = jax.shard_map(
    functools.partial(_on_device, own, specs),
    mesh=layout.mesh,
    in_specs=(by_group, by_group, specs, PartitionSpec()),
    out_specs=by_group,
    check_vma=False,
  )
  return run(x, plan, weights, key).reshape(shape)


def check_exchange(dispatch: Dispatch, config: ShardingConfig) -> None:
  """Refuses an exchange that cannot carry out a form of dispatch.

  Raises:
    UserError: names both, and what goes together.
  """
  if config.exchange == Exchange.COMPILER and dispatch != Dispatch.EINSUM:
    raise UserError(
      f"exchange = compiler is refused with dispatch = {dispatch}, for which it would gather all"
      " tokens everywhere: use dispatch = einsum, or exchange = all_to_all"
    )
  if config.hierarchical and dispatch == Dispatch.RAGGED:
    raise UserError(
      "hierarchical = true is refused with dispatch = ragged, whose rows travel in one step: use"
      " dispatch = gather, or hierarchical = false"
    )


@dataclasses.dataclass(frozen=True)
class _Device:
  """What every device knows of the exchange.

  Attributes:
    layout: the mesh.
    form: how experts work.
    split: whether each device has groups of its own; otherwise it has all of them.
  """

  layout: Layout
  form: ExpertForm
  split: bool

  @property
  def experts(self) -> tuple[str, ...]:
    """The mesh axes that experts are split over, the widest steps first."""
    return self.layout.mesh_axes("expert")

  @property
  def groups(self) -> tuple[str, ...]:
    """The mesh axes that groups are split over."""
    return self.layout.mesh_axes("group") if self.split else ()

  @property
  def columns(self) -> tuple[str, ...]:
    """The mesh axes that the hidden width of an expert is split over."""
    return self.layout.mesh_axes("expert_mlp")

  @property
  def apart(self) -> tuple[str, ...]:
    """The mesh axes along which devices do different work; along the others they do the same."""
    return tuple(dict.fromkeys((*self.groups, *self.experts, *self.columns)))


def _by_compiler(x, plan, weights, key, form: ExpertForm, layout: Layout) -> jax.Array:
  """Lets the compiler insert the exchanges, by naming where rows are before and after each.

  Only dispatch and combine, which stay inside groups, are kept out of its hands.
  """
  _check_split(*x.shape[:2], layout)
  dispatcher = get_dispatcher(form.dispatch)
  at_home, at_experts = (None, "group", None), ("expert", "slots", None)
  spec = layout.spec(at_home, (plan.num_experts, x.shape[0] * plan.capacity, x.shape[-1]))
  rows = map_groups(dispatcher.dispatch, layout, x, plan, out_specs=spec).rows
  rows = constrain(constrain(rows, at_home), at_experts)
  rows = apply_experts(SlottedRows(rows), weights, key, form.network).rows
  rows = constrain(constrain(rows, at_experts), at_home)
  by_expert = jnp.moveaxis(rows.reshape(plan.num_experts, x.shape[0], plan.capacity, -1), 1, 0)

  def combine(rows_GECD, plan):
    rows = jnp.moveaxis(rows_GECD, 0, 1).reshape(plan.num_experts, -1, x.shape[-1])
    return dispatcher.combine(SlottedRows(rows), plan)

  return map_groups(combine, layout, by_expert, plan)


def _on_device(own: _Device, specs, x, plan, weights, key) -> jax.Array:
  """Runs on one device: x (g, S, D) of its groups, and its part of every weight."""
  weights = {name: _gather(own, specs[name], w.astype(x.dtype)) for name, w in weights.items()}
  weights = _own_biases(own, weights)
  if key is not None and own.apart:
    key = jax.random.fold_in(key, jax.lax.axis_index(own.apart))
  run = _EXCHANGES[own.layout.config.exchange] if own.experts else _at_home
  chunks = own.layout.config.chunks
  # No chunk waits for another, so one's exchange can overlap with another's products.
  sums = [run(own, *_part(i, chunks, (x, plan)), weights, key) for i in range(chunks)]
  y = sums[0] if chunks == 1 else jnp.concatenate(sums)
  return _sum(jax.lax.psum, y, own.columns) if own.columns else y


def _at_home(own: _Device, x, plan, weights, key) -> jax.Array:
  return apply_plan(x, plan, weights, key, own.form)


def _all_to_all(own: _Device, x, plan, weights, key) -> jax.Array:
  """Sends every row to the device of its expert and takes the results back."""
  if own.form.dispatch == Dispatch.RAGGED:
    return exchange_ragged(x, plan, weights, key, own.form, own.experts, own.layout.platform)
  dispatcher, mesh = get_dispatcher(own.form.dispatch), own.layout.mesh
  steps = own.experts[::-1] if own.layout.config.hierarchical else (own.experts,)
  sizes = [math.prod(mesh.shape[axis] for axis in _names(step)) for step in steps]
  num_own = plan.num_experts // math.prod(sizes)
  rows = dispatcher.dispatch(x, plan).rows
  for step, size in zip(steps, sizes, strict=True):
    # (devices still to reach, devices of this step, own experts, rows, D)
    rows = rows.reshape(-1, size, num_own, *rows.shape[1:])
    rows = jax.lax.all_to_all(rows, step, split_axis=1, concat_axis=3, tiled=True)
    rows = rows.reshape(-1, *rows.shape[3:])
  rows = apply_experts(SlottedRows(rows), weights, key, own.form.network).rows
  for step in steps[::-1]:
    rows = rows.reshape(-1, 1, num_own, *rows.shape[1:])
    rows = jax.lax.all_to_all(rows, step, split_axis=3, concat_axis=1, tiled=True)
    rows = rows.reshape(-1, rows.shape[3], rows.shape[4])
  return dispatcher.combine(SlottedRows(rows), plan)


def _all_gather(own: _Device, x, plan, weights, key) -> jax.Array:
  """Applies the own experts to the tokens of all, and sums the results where tokens came from."""
  if own.split:
    x, plan = jax.tree.map(lambda a: jax.lax.all_gather(a, own.experts, tiled=True), (x, plan))
  num_own = weights["up"].shape[0]
  first = jax.lax.axis_index(own.experts) * num_own
  y = apply_plan(x, _of_experts(plan, first, num_own), weights, key, own.form)
  if not own.split:
    return _sum(jax.lax.psum, y, own.experts)
  scatter = functools.partial(jax.lax.psum_scatter, scatter_dimension=0, tiled=True)
  return _sum(scatter, y, own.experts)


_EXCHANGES = {Exchange.ALL_TO_ALL: _all_to_all, Exchange.ALL_GATHER: _all_gather}


def _sum(over, y, axes) -> jax.Array:
  """Sums over devices in float32, in the dtype of y."""
  return over(y.astype(jnp.float32), axes).astype(y.dtype)


def _of_experts(plan: Plan, first: jax.Array, count: int) -> Plan:
  """Returns the part of a plan that concerns the experts from `first` on."""
  if isinstance(plan, DensePlan):
    dispatch, combine = (
      jax.lax.dynamic_slice_in_dim(a, first, count, axis=2) for a in (plan.dispatch, plan.combine)
    )
    return dataclasses.replace(plan, dispatch=dispatch, combine=combine)
  expert = plan.expert - first
  valid = plan.valid & (expert >= 0) & (expert < count)
  return dataclasses.replace(
    plan,
    expert=jnp.where(valid, expert, 0),
    weight=jnp.where(valid, plan.weight, 0.0),
    valid=valid,
    num_experts=count,
  )


def _bare(plan: Plan) -> Plan:
  """Leaves out what only the layer reads."""
  plan = dataclasses.replace(plan, losses={}, metrics={})
  return dataclasses.replace(plan, identity=None) if isinstance(plan, RoutingPlan) else plan


def _whole_groups(x, plan: Plan, form: ExpertForm, layout: Layout) -> tuple[jax.Array, Plan, bool]:
  """Returns tokens and plan in groups that the devices can share, and whether they do.

  `ragged` dispatch knows no groups, so any equal parts of the tokens will do for it.
  """
  (G, S, _), parts = x.shape, layout.parts("group") * layout.config.chunks
  if G % parts == 0:
    return x, plan, True
  by_token = isinstance(plan, RoutingPlan) and plan.top_k is not None
  if _any_parts_do(form.dispatch, by_token, G * S, parts):
    return x.reshape(parts, -1, x.shape[-1]), _regrouped(plan, parts), True
  if layout.config.exchange == Exchange.ALL_GATHER:
    return x, plan, False
  _check_split(G, S, layout)
  return x, plan, True


def check_groups(
  shape: tuple[int, int], routing: RoutingConfig, dispatch: Dispatch, layout: Layout
) -> None:
  """Refuses a batch of (B, L) tokens whose routing groups the devices cannot share.

  Raises:
    UserError: names groups, devices and what would do.
  """
  tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
  G, S = jax.eval_shape(functools.partial(to_groups, config=routing), tokens).shape
  by_token = routing.selector.chooser == Chooser.TOKEN
  parts = layout.parts("group") * layout.config.chunks
  anyhow = layout.config.exchange == Exchange.ALL_GATHER
  if not anyhow and not _any_parts_do(dispatch, by_token, G * S, parts):
    _check_split(G, S, layout)


def _any_parts_do(dispatch: Dispatch, by_token: bool, tokens: int, parts: int) -> bool:
  """Tells whether tokens can be split without regard to their groups."""
  return dispatch == Dispatch.RAGGED and by_token and tokens % parts == 0


def _check_split(G: int, S: int, layout: Layout) -> None:
  """Refuses G groups of S tokens that the devices cannot share whole."""
  chunks = layout.config.chunks
  parts = layout.parts("group") * chunks
  if G % parts == 0:
    return
  sizes = " x ".join(f"{axis} = {layout.mesh.shape[axis]}" for axis in layout.mesh_axes("group"))
  near, rest = divmod(G * S, parts)
  ways = [f"grouping = fixed with group_size = {near}"] if near and not rest else []
  fewer = [n for n in range(1, chunks) if G % (parts // chunks * n) == 0]
  ways += [f"chunks = {fewer[-1]}"] if fewer else []
  raise UserError(
    f"{G} routing groups of {S} tokens do not split into {parts} equal parts ({sizes}"
    + (f", chunks = {chunks}" if chunks > 1 else "")
    + "), and a device holds whole groups: use "
    + "".join(f"{way}, " for way in ways)
    + "a smaller mesh, or exchange = all_gather"
    + (" with chunks = 1" if chunks > 1 else "")
  )


def _regrouped(plan: RoutingPlan, parts: int) -> RoutingPlan:
  """Cuts a token-major plan of (G, S*K) into equal groups of consecutive tokens."""
  size = plan.token.shape[0] * plan.num_tokens // parts
  token = jnp.repeat(jnp.arange(size, dtype=jnp.int32), plan.top_k)
  columns = ("expert", "slot", "weight", "valid")
  return dataclasses.replace(
    plan,
    token=jnp.broadcast_to(token, (parts, token.size)),
    num_tokens=size,
    # Slots were counted in the old groups; no expert gets more rows than there are tokens.
    capacity=size,
    **{name: getattr(plan, name).reshape(parts, -1) for name in columns},
  )


def _part(index: int, count: int, tree):
  """Returns one of `count` equal parts of every array, along its first axis."""

  def part(a):
    size = a.shape[0] // count
    return a[index * size : (index + 1) * size]

  return jax.tree.map(part, tree)


def _gather(own: _Device, spec: PartitionSpec, weight: jax.Array) -> jax.Array:
  """Returns the device's experts whole; the gradient is a reduce-scatter."""
  kept = {*own.experts, *own.columns}
  for dimension, names in enumerate(spec):
    others = tuple(name for name in _names(names) if name not in kept)
    if others:
      weight = jax.lax.all_gather(weight, others, axis=dimension, tiled=True)
  return weight


def _own_biases(own: _Device, weights: Weights) -> Weights:
  """Returns biases that fit the device's part of the hidden width, and are added once."""
  if not own.columns or "up_bias" not in weights:
    return weights
  index, width = jax.lax.axis_index(own.columns), weights["up"].shape[-1]
  own_part = {
    name: jax.lax.dynamic_slice_in_dim(weights[name], index * width, width, axis=1)
    for name in ("gate_bias", "up_bias")
    if name in weights
  }
  return weights | own_part | {"down_bias": jnp.where(index == 0, weights["down_bias"], 0)}


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return (axes,) if isinstance(axes, str) else axes or ()
