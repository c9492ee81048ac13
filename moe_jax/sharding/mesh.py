"""The mesh of devices: six named axes, over the links of a slice and over the network between."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from moe_jax.errors import UserError

# From what communicates least to what communicates most: neighbours in a slice are last.
MESH_AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")


def make_mesh(
  sizes: Mapping[str, int],
  devices: Sequence[jax.Device],
  dcn_sizes: Mapping[str, int] | None = None,
) -> Mesh:
  """Returns a mesh with all of `MESH_AXES`, in automatic mode.

  Args:
    sizes: of every axis over all slices; one may be -1, which takes all devices that the others
      leave.
    devices: all of them, real ones or those of a topology to compile for.
    dcn_sizes: how many of an axis's parts lie in other slices; none by default.

  Raises:
    UserError: the sizes do not fit the devices, or the slices.
  """
  sizes = _complete(sizes, len(devices))
  dcn = {axis: (dcn_sizes or {}).get(axis, 1) for axis in MESH_AXES}
  slices, own = math.prod(dcn.values()), {axis: sizes[axis] // dcn[axis] for axis in MESH_AXES}
  for axis in MESH_AXES:
    if sizes[axis] % dcn[axis]:
      raise UserError(f"dcn_{axis} = {dcn[axis]} does not divide {axis} = {sizes[axis]}")
  found = len({getattr(device, "slice_index", 0) for device in devices})
  if found not in (1, slices):
    raise UserError(
      f"the devices are {found} slices and the sizes over the network make {slices}: give dcn_data"
      f" = {found}, or other dcn sizes whose product is {found}"
    )
  shape, outer = tuple(own.values()), tuple(dcn.values())
  if slices == 1:
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  elif found == 1:
    grid = _emulated_slices(shape, outer, devices)
  else:
    grid = mesh_utils.create_hybrid_device_mesh(
      shape, outer, devices, allow_split_physical_axes=True
    )
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _complete(sizes: Mapping[str, int], count: int) -> dict[str, int]:
  """Returns sizes whose product is the number of devices."""
  known = math.prod(size for size in sizes.values() if size != -1)
  rest = [axis for axis in MESH_AXES if sizes[axis] == -1]
  if known > count or count % known or (not rest and known != count):
    given = ", ".join(f"{axis} = {size}" for axis, size in sizes.items() if size != 1)
    least = max(n for n in range(1, count + 1) if count % n == 0 and n <= known)
    raise UserError(
      f"a mesh of {given} has {known} devices, and there are {count}: the product must be {count}"
      f"; the nearest that divides it is {least}" + ("" if rest else ", and one size may be -1")
    )
  return {axis: count // known if axis in rest else sizes[axis] for axis in MESH_AXES}


def _emulated_slices(shape, outer, devices) -> np.ndarray:
  """Takes consecutive devices for slices, where the platform knows of none."""
  grid = np.asarray(devices).reshape(*outer, *shape)
  pairs = [axis for i in range(len(shape)) for axis in (i, len(shape) + i)]
  return grid.transpose(pairs).reshape([a * b for a, b in zip(outer, shape, strict=True)])
