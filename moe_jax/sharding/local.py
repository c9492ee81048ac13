"""Operations that the compiler would gather whole arrays for, run on each device by itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.sharding.context import constrain, current_layout
from moe_jax.sharding.layout import Layout


def row_top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns `jax.lax.top_k` along the last axis.

  XLA does not split it over devices, so on a mesh each device takes its part of the rows, which are
  those of tokens or groups.
  """
  layout, rows = current_layout(), x.reshape(-1, x.shape[-1])
  if layout is None or rows.shape[0] % layout.parts("group"):
    return jax.lax.top_k(x, k)
  values, index = map_groups(lambda a: jax.lax.top_k(a, k), layout, rows)
  shape = (*x.shape[:-1], k)
  return values.reshape(shape), index.reshape(shape)


def map_groups(
  function: Callable, layout: Layout, *trees: Any, out_specs: PartitionSpec | None = None
) -> Any:
  """Applies a function to each device's part of arrays whose first axis is split as groups are.

  `out_specs` tells how results are split; None = as the arguments.
  """
  by_group = PartitionSpec(layout.mesh_axes("group") or None)
  return jax.shard_map(
    function,
    mesh=layout.mesh,
    in_specs=by_group,
    out_specs=by_group if out_specs is None else out_specs,
    check_vma=False,
  )(*trees)


def look_up_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns the rows (B, L, D) of a table (V, D) at ids (B, L); NaN for an id beyond it.

  On a mesh each device gathers the columns of the rows that it holds, so that the gradient of the
  table is reduce-scattered; the compiler would gather rows by token, or all-reduce the gradient.
  """
  layout = current_layout()
  if layout is None:
    return _rows(table, ids, first=0, last=table.shape[0])
  columns, parts = layout.mesh_axes("embed"), layout.mesh_axes("vocab")

  def on_device(table, ids):
    if columns:
      table = jax.lax.all_gather(table, columns, axis=1, tiled=True)
    if not parts:
      return _rows(table, ids, first=0, last=table.shape[0])
    size = table.shape[0]
    first = jax.lax.axis_index(parts) * size
    rows = _rows(table, ids - first, first=-first, last=size * layout.parts("vocab") - first)
    return jax.lax.psum(rows, parts)

  tokens = layout.spec(("batch", "length"), ids.shape, "tokens")
  run = jax.shard_map(
    on_device,
    mesh=layout.mesh,
    in_specs=(layout.spec(("vocab", "embed"), table.shape, "the embedding"), tokens),
    out_specs=tokens,
    check_vma=False,
  )
  return run(table, ids)


def _rows(table, ids, *, first, last) -> jax.Array:
  """Returns the rows at ids; zeros for those of other parts, NaN outside [first, last)."""
  rows = table.at[ids].get(mode="fill", fill_value=0, wrap_negative_indices=False)
  known = (ids >= first) & (ids < last)
  return jnp.where(known[..., None], rows, jnp.nan)


def in_dtype(state: nnx.State, dtype: jax.typing.DTypeLike) -> nnx.State:
  """Casts the matrices of a block where they live, so that what is gathered and reduced is small.

  Left to the compiler, casts stand between a gradient's sum over devices and its split, which
  keeps it from reduce-scattering. Experts gather their own weights; the router's, norms and biases
  stay in float32.
  """
  if current_layout() is None:
    return state

  def cast(variable):
    axes = variable.get_metadata().get("axes", ())
    value = variable.get_value()
    own = axes[len(axes) - value.ndim :]
    if "embed" not in own or "router" in own or value.ndim < 2:
      return variable
    return variable.replace(constrain(value.astype(dtype), own))

  return jax.tree.map(cast, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
