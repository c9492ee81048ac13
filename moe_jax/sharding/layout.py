"""A layout: a mesh, and the table that places every array on it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.choices import did_you_mean
from moe_jax.errors import UserError
from moe_jax.layers.parameters import LOGICAL_AXES
from moe_jax.sharding.config import ShardingConfig
from moe_jax.sharding.mesh import make_mesh
from moe_jax.sharding.rules import ACTIVATION_AXES, Rules, rules_of

# Names of an array's axes; None is never split.
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """Where every array lives.

  Attributes:
    mesh: of all devices.
    rules: mesh axes by logical axis.
    config: what they were made of.
  """

  mesh: Mesh
  rules: Rules
  config: ShardingConfig

  @property
  def platform(self) -> str:
    """What the devices are: cpu, gpu or tpu, also where a program is only compiled for them."""
    return self.mesh.devices.flat[0].platform

  def mesh_axes(self, name: str | None) -> tuple[str, ...]:
    """Returns the mesh axes that a logical axis is split over, those of size 1 left out.

    Raises:
      UserError: no logical axis has this name.
    """
    if name is None:
      return ()
    known = LOGICAL_AXES | ACTIVATION_AXES
    if name not in known:
      raise UserError(f"{name!r} is no logical axis; {did_you_mean(name, known)}")
    return tuple(axis for axis in self.rules.get(name, ()) if self.mesh.shape[axis] > 1)

  def parts(self, name: str | None) -> int:
    """Returns how many parts a logical axis is split into."""
    return math.prod(self.mesh.shape[axis] for axis in self.mesh_axes(name))

  def spec(self, axes: Axes, shape: Sequence[int], what: str = "an array") -> PartitionSpec:
    """Returns the partition of an array.

    Args:
      axes: one logical name a dimension, or None.
      shape: of the whole array.
      what: its name in messages.

    Raises:
      UserError: an unknown name, a dimension that its mesh axes do not divide, or two dimensions
        over one mesh axis.
    """
    split = [self.mesh_axes(name) for name in axes]
    used = [axis for names in split for axis in names]
    for axis in used:
      if used.count(axis) > 1:
        both = [str(name) for name, names in zip(axes, split, strict=True) if axis in names]
        raise UserError(
          f"{what} of shape {tuple(shape)} cannot have both its axes {' and '.join(both)} split"
          f" over {axis} = {self.mesh.shape[axis]}, as layout = {self.config.layout} says"
        )
    for name, names, size in zip(axes, split, shape, strict=True):
      if size % self.parts(name):
        raise UserError(self._uneven(what, name, names, size))
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in split))

  def sharding(self, axes: Axes, shape: Sequence[int], what: str = "an array") -> NamedSharding:
    """Returns where an array lives; see `spec`."""
    return NamedSharding(self.mesh, self.spec(axes, shape, what))

  def of_tree(self, tree: Any) -> Any:
    """Returns the shardings of a tree of `nnx.Variable` with named axes and of plain arrays.

    Plain arrays, and variables of another rank than their names (what an optimiser keeps in place
    of a matrix), are on every device. The tree may be abstract.
    """

    def of_leaf(path, leaf):
      if not isinstance(leaf, nnx.Variable):
        return self.replicated
      value, axes = leaf.get_value(), leaf.get_metadata().get("axes")
      if axes is None or len(axes) != value.ndim:
        return leaf.replace(self.replicated)
      return leaf.replace(self.sharding(axes, value.shape, _name(path)))

    return jax.tree_util.tree_map_with_path(
      of_leaf, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )

  @property
  def replicated(self) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  def _uneven(self, what, name, names, size) -> str:
    parts = self.parts(name)
    sizes = " x ".join(f"{axis} = {self.mesh.shape[axis]}" for axis in names)
    below, above = size // parts * parts, -(-size // parts) * parts
    near = f"{below} or {above}" if below else f"{above}"
    return (
      f"the axis {name} of {what} has size {size}, which {sizes}"
      + (f" = {parts}" if len(names) > 1 else "")
      + f" does not divide: make it {near}, or the mesh smaller"
    )


def make_layout(config: ShardingConfig, devices: Sequence[jax.Device]) -> Layout | None:
  """Returns the layout of a config on these devices; None where it asks for one device alone.

  Raises:
    UserError: the mesh does not fit the devices.
  """
  if all(size == 1 for size in config.sizes.values()):
    return None
  mesh = make_mesh(config.sizes, devices, config.dcn_sizes)
  return None if mesh.size == 1 else Layout(mesh, rules_of(config.layout), config)


def _name(path) -> str:
  keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
  return "/".join(keys)
